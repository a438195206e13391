"""The model card: what an adapter is, on what it was trained and how well it does, for people, from the run's ledger."""

from collections.abc import Sequence
from pathlib import Path

from flapsam.adapters.store import CARD, AdapterCard
from flapsam.base.files import write_text
from flapsam.learning.metrics import CaseScores, Summary, by_site, scores_of, summarise
from flapsam.run.config import SPLITS
from flapsam.run.ledger import Cases, CaseTested, Cohort, Event, SiteJoined
from flapsam.sam import strategy

FEW_CASES = 5
"""Below this many test cases at a site its scores say little."""


def write_model_card(folder: Path, card: AdapterCard, cohort: Cohort, events: Sequence[Event]) -> None:
    """Write the model card into an adapter's folder; arguments as ``model_card``."""
    write_text(folder / "README.md", model_card(card, cohort, events))


def model_card(card: AdapterCard, cohort: Cohort, events: Sequence[Event]) -> str:
    """The card as Markdown, with the header that model hubs read.

    Args:
        card: the adapter's description.
        cohort: who trained it.
        events: the run's ledger.
    """
    joined = [event for event in events if isinstance(event, SiteJoined) and cohort.site in (None, event.site)]
    cases = {event.site: event.cases for event in joined}
    scores = [scores_of(event) for event in events if isinstance(event, CaseTested) and event.cohort == cohort]
    together = {
        "federated": f"by {len(cases)} sites together",
        "local": "by one site alone",
        "centralised": f"on the pooled data of {len(cases)} sites",
    }[card.mode]
    classes = ", ".join(card.classes)
    parts = [
        _head(card),
        f"# Segmentation of {classes}",
        f"An adapter for the Segment Anything Model `{card.backbone.name}`, trained {together} with "
        f"[FLAP-SAM](https://arxiv.org/abs/2407.21739) for {card.rounds} rounds (strategy `{card.strategy}`"
        f"{f', rank {card.lora.rank}' if strategy(card.strategy).lora else ''}). It needs no prompts. "
        f"Label maps hold 0 for background and {_values(card)}.",
        "```\nflapsam predict THIS_FOLDER IMAGES -o LABEL_MAPS\n```",
        "## Training and test",
        _sites(cases, scores, card.classes),
        "Test cases were read once, after the last round. Dice is computed in 3-D on each case's own grid; a site's figure "
        "is the mean over its test cases."
        if scores
        else "Test cases stayed at the sites and were not read: `flapsam evaluate` scores this adapter there.",
        "## Intended use",
        f"Research on the segmentation of {classes} in volumes like those of the sites above: the same modality, "
        "region and slice direction. Check it on labelled cases of your own before you rely on it. "
        "It is not a medical device and must not guide diagnosis or treatment.",
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(card, cases, scores)),
        "## Details",
        "\n".join(f"- {name}: {value}" for name, value in _details(card).items()),
    ]
    return "\n\n".join(parts) + "\n"


def _head(card: AdapterCard) -> str:
    tags = "\n".join(f"- {tag}" for tag in ("medical", "image-segmentation", "segment-anything", "federated-learning"))
    base = f"base_model: {card.backbone.name}\n" if "/" in card.backbone.name else ""
    return f"---\nlicense: {card.licence.lower()}\nlibrary_name: flapsam\n{base}tags:\n{tags}\n---"


def _values(card: AdapterCard) -> str:
    return ", ".join(f"{value} for {name}" for value, name in enumerate(card.classes, start=1))


def _sites(cases: dict[str, Cases], scores: Sequence[CaseScores], classes: Sequence[str]) -> str:
    summaries = {site: summarise(part) for site, part in by_site(scores).items()}
    rows = [
        [site, *(str(counts[split]) for split in SPLITS), *_dice(summaries.get(site), classes)]
        for site, counts in cases.items()
    ]
    if len(rows) > 1:
        total = [str(sum(counts[split] for counts in cases.values())) for split in SPLITS]
        rows.append(["all", *total, *_dice(summarise(scores), classes)])
    head = ["site", "training cases", "validation", "test", *(f"Dice, {name}" for name in classes), "mean"]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def _dice(summary: Summary | None, classes: Sequence[str]) -> list[str]:
    values = [*(summary.dice.get(name) for name in classes), summary.mean_dice] if summary else [None] * (len(classes) + 1)
    return ["–" if value is None else f"{value:.3f}" for value in values]


def _limits(card: AdapterCard, cases: dict[str, Cases], scores: Sequence[CaseScores]) -> list[str]:
    many = f"{len(cases)} sites" if len(cases) > 1 else "one site"
    limits = [
        f"Trained on {sum(counts['train'] for counts in cases.values())} cases of {many}: elsewhere, "
        "with other scanners and patients, expect lower scores."
    ]
    few = [site for site, counts in cases.items() if counts["test"] < FEW_CASES]
    if few and scores:
        limits.append(f"Fewer than {FEW_CASES} test cases at {', '.join(few)}: the scores there are uncertain.")
    for name, value in summarise(scores).dice.items():
        if value is not None and value < 0.5:
            limits.append(f"A mean Dice of {value:.3f} for {name}: most of it is missed or wrong.")
    neighbours = "sees its two neighbours, no more" if card.samples.channels == "adjacent" else "sees no other"
    limits.append(f"Slices are segmented one by one; each {neighbours}.")
    if card.backbone.weights == "random":
        limits.append("The backbone was not pretrained.")
    return limits


def _details(card: AdapterCard) -> dict[str, str]:
    samples = card.samples
    clip = f"intensities cut to {samples.clip[0]:g} … {samples.clip[1]:g}, " if samples.clip else ""
    return {
        "Input": f"{clip}scaled to [0, 1] by {samples.scaling}, slices along axis `{samples.axis}`, {samples.resize} to "
        f"{samples.size} pixels, channels `{samples.channels}`",
        "Backbone": f"`{card.backbone.name}`, weights `{card.backbone.weights}`, SHA-256 of the frozen tensors "
        f"`{card.backbone.checksum}`",
        "Run": f"`{card.run}`, flapsam {card.flapsam}; the rest is in `{CARD}`",
        "Licence": card.licence,
    }
