"""What training together gives: mean test Dice by site of each mode, and the differences."""

from flapsam.experiments.comparison import compare
from flapsam.metrics import CaseScores, mean
from flapsam.report.figures.drawing import INK, MARKERS, MUTED, SERIES, WIDTH, chart, legend, new_figure, short
from flapsam.report.run import TITLES, Run
from flapsam.report.section import Section, Table
from flapsam.report.units import interval, number

POOLED = "all cases"
OPENED = 12
"""A table of so many rows is seen without a click."""


def modes_by_site(run: Run, subjects: dict[str, str]) -> Section | None:
    """A row a site; None where no test case was scored.

    Args:
        run: the run.
        subjects: ``SITE/CASE`` → subject, of the cases whose subject is known; others are their own.
    """
    if not run.scores:
        return None
    names = [*sorted({site for sites in run.summaries.values() for site in sites}), POOLED]
    dices = {mode: {**{s: one.mean_dice for s, one in sites.items()}} for mode, sites in run.summaries.items()}
    for mode, sites in dices.items():
        pooled = run.pooled(mode)
        sites[POOLED] = pooled.mean_dice if pooled else None
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
    told = ", ".join(f"{TITLES[mode]} {number(sites[POOLED])}" for mode, sites in dices.items())
    return Section(
        "gain",
        "What training together gives" if compared else "Test Dice by site",
        _text(compared),
        [chart(figure, "Mean test Dice by site and mode", f"Over all cases: {told}.")],
        [_table(run, names, dices, compared, subjects)],
    )


def mean_dices(scores: list[CaseScores]) -> dict[str, float]:
    """``SITE/CASE`` → mean Dice over its classes."""
    found = {f"{score.site}/{score.case}": mean(score.dice.values()) for score in scores}
    return {key: value for key, value in found.items() if value is not None}


def _text(compared: list[str]) -> str:
    text = "Mean Dice over the classes and a site's test cases; the last row is the mean over all cases."
    if compared:
        text += (
            " The differences are means over the cases that both have, of the federated model's Dice minus the other's, "
            "with 95 % intervals from a bootstrap over subjects."
        )
    return text


def _table(
    run: Run,
    names: list[str],
    dices: dict[str, dict[str, float | None]],
    compared: list[str],
    subjects: dict[str, str],
) -> Table:
    together = mean_dices(run.scores["federated"]) if compared else {}
    others = {mode: mean_dices(run.scores[mode]) for mode in compared}
    of_each = {key: subjects.get(key, key) for key in together}
    rows = []
    for name in names:
        kept = together if name == POOLED else {k: v for k, v in together.items() if k.rpartition("/")[0] == name}
        differences = [interval(compare(kept, other, of_each)) for other in others.values()]
        count = len({(s.site, s.case) for scores in run.scores.values() for s in scores if name in (s.site, POOLED)})
        rows.append([name, str(count), *(number(sites.get(name)) for sites in dices.values()), *differences])
    head = ["site", "cases", *(TITLES[mode] for mode in dices), *(f"federated − {TITLES[mode]}" for mode in compared)]
    return Table("gain-table", "Mean test Dice by site", head, rows, opened=len(rows) <= OPENED)
