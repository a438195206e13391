"""Write the model card of an adapter, for people: what it is, its training data and its scores, from the run's ledger."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from flapsam.adapters.store import CARD, AdapterCard
from flapsam.base.escaping import markdown
from flapsam.base.files import write_text
from flapsam.learning.metrics import CaseScores, Summary, by_site, rule_for_absent, scores_of, summarise
from flapsam.run.config import SPLITS, Privacy
from flapsam.run.ledger import Cases, CaseTested, Cohort, Event, SiteJoined, SiteTested
from flapsam.run.participation import participation
from flapsam.run.site_scores import SiteScores
from flapsam.sam import strategy
from flapsam.sam.sources import SOURCES

FEW_CASES = 5
"""Number of test cases below which the card calls a site's scores uncertain."""


def write_model_card(folder: Path, card: AdapterCard, cohort: Cohort, events: Sequence[Event]) -> None:
    """Write the model card into an adapter's folder.

    Args:
        folder: the adapter's folder.
        card: the adapter's description.
        cohort: the cohort that trained it.
        events: the events of the run's ledger.
    """
    write_text(folder / "README.md", model_card(card, cohort, events))


def model_card(card: AdapterCard, cohort: Cohort, events: Sequence[Event]) -> str:
    """The model card as Markdown, with the header that model hubs read.

    Args:
        card: the adapter's description.
        cohort: the cohort that trained it.
        events: the events of the run's ledger.
    """
    alone = cohort.site if cohort.mode == "local" else None
    sites = [event for event in events if isinstance(event, SiteJoined) and alone in (None, event.site)]
    own = markdown(cohort.site or "")
    cases = {event.site: event.cases for event in sites}
    scores = [
        scores_of(event)
        for event in events
        if isinstance(event, CaseTested) and event.cohort == cohort and not event.elsewhere
    ]
    tested = [event for event in events if isinstance(event, SiteTested) and event.cohort == cohort]
    told = {event.site: event.scores for event in tested if event.scores}
    training = {
        "federated": f"by federated learning across {_count(len(cases), 'site')}",
        "local": "at one site alone",
        "personal": f"by federated learning across {_count(len(cases), 'site')}, and in part for {own} alone,",
        "centralised": f"on the pooled data of {_count(len(cases), 'site')}",
    }[card.mode]
    rank = f" at rank {card.lora.rank}" if strategy(card.strategy).lora else ""
    classes = _listed([markdown(name) for name in card.classes])
    parts = [
        _head(card),
        f"# Segmentation of {classes}",
        f"This adapter for the Segment Anything Model `{card.backbone.name}` segments {classes} without prompts. "
        f"It was trained {training} for {_count(card.rounds, 'round')} with flapsam, an implementation of "
        f"[FLAP-SAM](https://arxiv.org/abs/2407.21739). The strategy was `{card.strategy}`{rank}.",
        "To segment your images, run:",
        "```\nflapsam predict THIS_FOLDER IMAGES -o LABEL_MAPS\n```",
        f"The label maps contain {_values(card)}.",
        "## Training and evaluation",
        _sites(cases, scores, card.classes, told),
        *([took_part] if card.mode == "federated" and (took_part := participation(events).sentence()) else []),
        _evaluated(scores, told),
        "## Intended use",
        f"This adapter is meant for research on the segmentation of {classes}. Use it on volumes like those of the sites "
        "above, with the same modality, body region and slice direction. Check it on labelled cases of your own before you "
        "rely on it. It is not a medical device and must not guide diagnosis or treatment.",
        "## Limitations",
        "\n".join(f"- {limit}" for limit in _limits(card, cases, scores)),
        "## Details",
        "\n".join(f"- {name}: {value}" for name, value in _details(card).items()),
    ]
    return "\n\n".join(parts) + "\n"


def _head(card: AdapterCard) -> str:
    base = {"base_model": card.backbone.name} if "/" in card.backbone.name else {}
    tags = ["medical", "image-segmentation", "segment-anything", "federated-learning"]
    head = {"license": card.licence.lower(), "library_name": "flapsam", **base, "tags": tags}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _values(card: AdapterCard) -> str:
    return _listed([f"{value} for {name}" for value, name in enumerate(["background", *map(markdown, card.classes)])])


def _count(number: int, noun: str) -> str:
    """A number and its noun, such as "1 site" or "2 sites"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Sequence[str]) -> str:
    """Names as one phrase, such as "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _evaluated(scores: Sequence[CaseScores], told: dict[str, SiteScores]) -> str:
    """What the scores in the table of sites are."""
    if scores:
        return (
            "Test cases were used only once, after the last round. Dice is computed in 3-D on each case's own grid and "
            "averaged over the test cases of a row. Mean Dice is the average over the classes. "
            f"{rule_for_absent(scores)} A dash marks a missing score.{_counts(scores)}"
        )
    if told:
        return (
            "The sites scored the adapter on their own test cases after the last round. Only summary figures left "
            "them. A dash marks a score that a site did not tell."
        )
    return (
        "This adapter has not been scored on test cases. The cases stayed at their sites, where `flapsam predict` and "
        "`flapsam evaluate` can score the adapter."
    )


def _sites(
    cases: dict[str, Cases], scores: Sequence[CaseScores], classes: Sequence[str], told: dict[str, SiteScores]
) -> str:
    summaries = {site: summarise(part) for site, part in by_site(scores).items()}
    rows = []
    for site, counts in cases.items():
        dice = _told_dice(told[site], classes) if site in told else _dice(summaries.get(site), classes)
        rows.append([markdown(site), *_told([counts[split] for split in SPLITS]), *dice])
    if len(rows) > 1:
        total = _told([sum(counts[split] for counts in cases.values()) for split in SPLITS])
        rows.append(["all sites", *total, *_dice(summarise(scores), classes)])
    dice = [f"Dice, {markdown(name)}" for name in classes]
    head = ["Site", "Training cases", "Validation cases", "Test cases", *dice, "Mean Dice"]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def _told(counts: Sequence[int]) -> list[str]:
    """Numbers of cases. All are 0 where a site does not tell any, as in a private run."""
    return [str(count) if any(counts) else "–" for count in counts]


def _dice(summary: Summary | None, classes: Sequence[str]) -> list[str]:
    values = [*(summary.dice.get(name) for name in classes), summary.mean_dice] if summary else [None] * (len(classes) + 1)
    return ["–" if value is None else f"{value:.3f}" for value in values]


def _told_dice(scores: SiteScores, classes: Sequence[str]) -> list[str]:
    """Dice by class and its mean, as far as a hospital has told them."""
    by_class = scores.measures.get("dice", {})
    figures = [*(by_class.get(name) for name in classes), scores.mean]
    return ["–" if one is None else f"{one.mean:.3f}" for one in figures]


def _counts(scores: Sequence[CaseScores]) -> str:
    """A sentence that counts the cases of the means that leave some out; empty if none does."""
    summaries = {markdown(site): summarise(part) for site, part in by_site(scores).items()} | {
        "all sites": summarise(scores)
    }
    fewer = [
        f"{site}, {markdown(name)}: {count} of {summary.cases}"
        for site, summary in summaries.items()
        for name, count in ((name, mean.cases if mean else 0) for name, mean in summary.measures["dice"].items())
        if 0 < count < summary.cases
    ]
    return f" Means that leave cases out: {'; '.join(fewer)}." if fewer else ""


def _limits(card: AdapterCard, cases: dict[str, Cases], scores: Sequence[CaseScores]) -> list[str]:
    number = sum(counts["train"] for counts in cases.values())
    training_cases = _count(number, "case") if number else "an undisclosed number of cases"
    limits = [
        f"The adapter was trained on {training_cases} from {_count(len(cases), 'site')}. "
        "Expect lower scores elsewhere, on other scanners and patients."
    ]
    small = [markdown(site) for site, counts in cases.items() if counts["test"] < FEW_CASES]
    if small and scores:
        limits.append(f"Scores are uncertain at sites with fewer than {FEW_CASES} test cases: {_listed(small)}.")
    for name, value in summarise(scores).dice.items():
        if value is not None and value < 0.5:
            limits.append(f"The mean Dice of {markdown(name)} is only {value:.3f}. Much of it is missed or wrong.")
    if not strategy(card.strategy).volume:
        neighbours = "with only the two" if card.samples.channels == "adjacent" else "without"
        limits.append(f"Slices are segmented one at a time, {neighbours} neighbouring slices as context.")
    if card.backbone.weights == "random":
        limits.append("The backbone was not pretrained.")
    backbone = card.backbone
    made_by = [known for known in SOURCES.values() if backbone.name == known.name or backbone.weights == known.file]
    limits += sorted({known.caution for known in made_by if known.caution and backbone.weights != "random"})
    return limits


def _details(card: AdapterCard) -> dict[str, str]:
    samples = card.samples
    clip = f"clipped to {samples.clip[0]:g} … {samples.clip[1]:g} and " if samples.clip else ""
    extent = {"window": "each slice and its two neighbours on either side", "volume": "the volume"}[samples.scaling]
    direction = "perpendicular to the axis of largest spacing" if samples.axis == "auto" else samples.axis
    shape = {"stretch": "stretched", "pad": "scaled and padded"}[samples.resize]
    private = {"Privacy": _privacy(card.privacy)} if card.privacy else {}
    return private | {
        "Intensities": f"{clip}scaled to [0, 1] over {extent}",
        "Slices": f"{direction}, {shape} to {samples.size} × {samples.size} pixels, channels `{samples.channels}`",
        "Backbone": f"`{card.backbone.name}`, weights `{card.backbone.weights}`{_origin(card)}, SHA-256 of the frozen "
        f"tensors `{card.backbone.checksum}`",
        "Run": f"`{card.run}`, trained with flapsam {card.flapsam}; `{CARD}` describes the adapter in full",
        "Licence": markdown(card.licence),
    }


def _privacy(privacy: Privacy) -> str:
    return (
        f"differentially private for each patient of a site, with ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g} (DP-SGD; "
        "every site adds its own noise; neighbouring data sets differ by one patient)"
    )


def _origin(card: AdapterCard) -> str:
    """Where the backbone's file comes from, if it has the name under which it is published."""
    for known in SOURCES.values():
        if known.file == card.backbone.weights and not known.ships:
            return f" from the Python package `{known.package}`" if known.package else f" from <{known.url}>"
    return ""
