"""Gain from federated training: mean test Dice by site and mode, and the differences between modes."""

from collections.abc import Mapping, Sequence

from flapsam.experiments.paired import compare
from flapsam.learning.metrics import CaseScores, by_site, rule_for_absent, summarise
from flapsam.report.figures.drawing import INK, MARKERS, MUTED, SERIES, WIDTH, chart, legend, lowest, new_figure, short
from flapsam.report.run import TITLES, Scores
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, interval, number, with_interval

POOLED = "all cases"
OPENED = 12
"""Largest number of rows of a table that is visible without a click."""


def modes_by_site(scores: Scores, subjects: Mapping[str, str]) -> Section | None:
    """A chart and a table of mean test Dice by site and mode; None if no case is tested.

    Args:
        scores: mode → test scores.
        subjects: ``SITE/CASE`` → subject, for cases with a known subject. Every other case counts as its own subject.
    """
    if not scores:
        return None
    dices = {mode: _mean_dices_by_site(cases) for mode, cases in scores.items()}
    every = [*sorted({site for sites in dices.values() for site in sites} - {POOLED}), POOLED]
    main = dices.get("federated") or next(iter(dices.values()))
    shown, note = lowest({site: main.get(site) for site in every if site != POOLED}, "the lowest Dice")
    names = [*shown, POOLED]
    figure = new_figure(WIDTH, 1.3 + 0.3 * len(names))
    axes = figure.subplots()
    for row, name in enumerate(names):
        values = [value for sites in dices.values() if (value := sites.get(name)) is not None]
        if values:
            axes.plot([min(values), max(values)], [row, row], color=MUTED, linewidth=1, zorder=1)
    looks = {}
    for index, (mode, sites) in enumerate(dices.items()):
        looks[mode] = {"color": SERIES[index], "marker": MARKERS[index], "linestyle": "none"}
        places = [(value, row) for row, name in enumerate(names) if (value := sites.get(name)) is not None]
        axes.plot([value for value, _ in places], [row for _, row in places], **looks[mode], markersize=6, zorder=2)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axhline(len(names) - 1.5, color=INK, linewidth=0.8)
    axes.set_xlabel("mean test Dice over the classes")
    legend(figure, [(TITLES[mode], look) for mode, look in looks.items()])
    compared = [mode for mode in dices if mode != "federated"] if "federated" in dices else []
    pooled = ", ".join(f"{TITLES[mode]} {number(sites[POOLED])}" for mode, sites in dices.items())
    return Section(
        "gain",
        "Gain from federated training" if compared else "Test Dice by site",
        f"{_text(compared)} {rule_for_absent(score for cases in scores.values() for score in cases)}{note}",
        [chart(figure, "Mean test Dice by site and mode", f"Over all cases: {pooled}.")],
        [_table(scores, every, compared, subjects)],
    )


def mean_dices(scores: Sequence[CaseScores]) -> dict[str, float]:
    """``SITE/CASE`` → mean Dice over the classes, for the cases with at least one."""
    dices = {f"{score.site}/{score.case}": score.mean_dice for score in scores}
    return {key: value for key, value in dices.items() if value is not None}


def _text(compared: list[str]) -> str:
    text = (
        "Mean Dice over the classes and a site's test cases, with its 95 % interval over patients. The last row is the mean "
        "over all cases. n is the number of cases of a mean that leaves some out."
    )
    if compared:
        text += (
            " Differences are the federated model's Dice minus that of the other model, averaged over the cases in common, "
            "with 95 % intervals from a bootstrap over subjects."
        )
    return text


def _mean_dices_by_site(cases: Sequence[CaseScores]) -> dict[str, float | None]:
    """Site → mean Dice of its cases, and ``POOLED`` → mean Dice of all cases."""
    return {site: summarise(part).mean_dice for site, part in by_site(cases).items()} | {POOLED: summarise(cases).mean_dice}


def _texts_by_site(cases: Sequence[CaseScores]) -> dict[str, str]:
    """The same means as texts, with their number of cases if some have no Dice."""
    summaries = {site: summarise(part) for site, part in by_site(cases).items()} | {POOLED: summarise(cases)}
    return {site: with_interval(s.mean, cases=s.cases) for site, s in summaries.items()}


def _table(
    scores: Scores,
    names: list[str],
    compared: list[str],
    subjects: Mapping[str, str],
) -> Table:
    federated = mean_dices(scores["federated"]) if compared else {}
    references = [mean_dices(scores[mode]) for mode in compared]
    subject_of = {key: subjects.get(key, key) for key in federated}
    texts = {mode: _texts_by_site(cases) for mode, cases in scores.items()}
    places: dict[str, set[tuple[str, str]]] = {POOLED: {(s.site, s.case) for cases in scores.values() for s in cases}}
    for site, case in places[POOLED]:
        places.setdefault(site, set()).add((site, case))
    rows = []
    for name in names:
        kept = federated if name == POOLED else {k: v for k, v in federated.items() if k.rpartition("/")[0] == name}
        differences = [interval(compare(kept, reference, subject_of)) for reference in references]
        rows.append([name, str(len(places[name])), *(sites.get(name, NONE) for sites in texts.values()), *differences])
    head = ["site", "cases", *(TITLES[mode] for mode in scores), *(f"federated − {TITLES[mode]}" for mode in compared)]
    return Table("gain-table", "Mean test Dice by site", head, rows, opened=len(rows) <= OPENED)
