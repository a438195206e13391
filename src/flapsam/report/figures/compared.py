"""Charts of several runs beside each other."""

from collections.abc import Callable, Mapping
from typing import Any

from flapsam.config import flat
from flapsam.experiments.comparison import Difference, compare
from flapsam.metrics import CaseScores
from flapsam.report.figures.curves import means_of
from flapsam.report.figures.drawing import (
    MARKERS,
    SERIES,
    WIDTH,
    bytes_axis,
    chart,
    every,
    legend,
    new_figure,
    rounds_axis,
    short,
    value_axis,
)
from flapsam.report.figures.gain import mean_dices
from flapsam.report.run import TITLES, Run, Series
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, interval, number, size

Runs = Mapping[str, Run]
"""Name → run, in the order in which they were given."""


def overlaid(runs: Runs, mode: str, name: str, title: str, what: str, read: Callable[[Run], Series]) -> Section | None:
    """A line a run: the mean over its sites, round by round; None where no run has any.

    Args:
        runs: to be compared.
        mode: the runs' mode, for the text.
        name: id of the section.
        title: of the section.
        what: is drawn, at the axis.
        read: the series of a run's sites.
    """
    means = {label: means for label, run in runs.items() if (means := means_of(read(run)))}
    if not means:
        return None
    figure = new_figure(WIDTH, 3.9)
    axes = figure.subplots()
    looks = _looks(runs)
    for label, points in means.items():
        axes.plot(list(points), list(points.values()), markevery=every(len(points)), **looks[label])
    value_axis(axes, what)
    rounds_axis(axes)
    legend(figure, [(label, looks[label]) for label in means])
    rounds = sorted({one for points in means.values() for one in points})
    rows = [[str(one), *(number(points.get(one)) for points in means.values())] for one in rounds]
    ends = ", ".join(f"{label} {number(points[max(points)])}" for label, points in means.items())
    return Section(
        name,
        title,
        f"Mean of the sites, {TITLES[mode]}.",
        [chart(figure, f"{title}, a line a run", f"At the end: {ends}.")],
        [Table(f"{name}-table", title, ["round", *means], rows, text_columns=0)],
    )


def dice_by_class(runs: Runs, mode: str, subjects: Mapping[str, str]) -> Section | None:
    """Test Dice of every run, and its paired difference to the first's; None where no run was tested.

    Args:
        runs: to be compared.
        mode: whose scores are taken.
        subjects: ``SITE/CASE`` → subject, of the cases whose subject is known; others are their own.
    """
    scores = {label: run.scores[mode] for label, run in runs.items() if mode in run.scores}
    if not scores:
        return None
    classes = list(dict.fromkeys(name for label in scores for name in runs[label].classes))
    rows: list[list[str]] = []
    figure = new_figure(WIDTH, 1.4 + 0.34 * (len(classes) + 1))
    axes = figure.subplots()
    looks = _looks(runs)
    lines = ["mean", *classes]
    for label, found in scores.items():
        values = [_pooled(found, name) for name in lines]
        places = [(value, row) for row, value in enumerate(values) if value is not None]
        look = {**looks[label], "linestyle": "none", "markersize": 6}
        axes.plot([value for value, _ in places], [row for _, row in places], **look)
    axes.set_yticks(range(len(lines)), [short(name) for name in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(f"test Dice, {TITLES[mode]}")
    legend(figure, [(label, {**looks[label], "linestyle": "none"}) for label in scores])
    first = next(iter(scores))
    for label, found in scores.items():
        for name in lines:
            difference = NONE if label == first else interval(_difference(found, scores[first], name, subjects))
            both = len(_dices(found, name).keys() & _dices(scores[first], name).keys())
            rows.append([label, name, str(len(_dices(found, name))), number(_pooled(found, name)), str(both), difference])
    head = ["run", "class", "cases", "Dice", "cases in both", f"minus that of {first}"]
    told = ", ".join(f"{label} {number(_pooled(found, 'mean'))}" for label, found in scores.items())
    return Section(
        "test",
        "Test Dice",
        f"Mean over all test cases. Differences to {first} are means over the cases that both runs have, with 95 % "
        "intervals from a bootstrap over subjects.",
        [chart(figure, "Test Dice by class and run", f"Mean over the classes: {told}.")],
        [
            Table(
                "differences-table", f"Test Dice, and paired differences to {first}", head, rows, text_columns=2, opened=True
            )
        ],
    )


def traffic_of_each(runs: Runs) -> Section | None:
    """Bytes of a site in all rounds; None where nothing travelled."""
    totals = {label: run.travelled / len(sites) for label, run in runs.items() if (sites := run.bytes_of("bytes_up"))}
    if not totals:
        return None
    figure = new_figure(WIDTH, 1.2 + 0.34 * len(totals))
    axes = figure.subplots()
    looks = _looks(runs)
    for row, (label, value) in enumerate(totals.items()):
        axes.barh(row, value, color=looks[label]["color"], height=0.6)
        axes.annotate(size(value), (value, row), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(totals)), [short(label) for label in totals])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    bytes_axis(axes.xaxis, [min(totals.values()) / 3, max(totals.values()) * 8])
    rows = [[label, str(runs[label].rounds("federated")), size(value)] for label, value in totals.items()]
    told = ", ".join(f"{label} {size(value)}" for label, value in totals.items())
    return Section(
        "traffic",
        "Traffic",
        "Measured bytes of a site in all rounds, both ways.",
        [chart(figure, "Traffic of a site by run", told)],
        [Table("traffic-table", "Traffic of a site", ["run", "rounds", "bytes of a site"], rows)],
    )


def configurations(runs: Runs) -> Section:
    """The fields in which the runs differ."""
    trees = {label: flat(run.config, "output", "notes", "bench") for label, run in runs.items()}
    fields = list(dict.fromkeys(field for tree in trees.values() for field in tree))
    different = [field for field in fields if len({tree.get(field, NONE) for tree in trees.values()}) > 1]
    rows = [[field, *(tree.get(field, NONE) for tree in trees.values())] for field in different]
    text = "All other fields agree." if different else "No field of their configurations differs."
    table = Table("fields-table", "Fields that differ", ["field", *trees], rows, text_columns=len(trees) + 1, opened=True)
    return Section("fields", "Configurations", text, tables=[table] if different else [])


def _looks(runs: Runs) -> dict[str, dict[str, Any]]:
    count = len(SERIES)
    styles = ("-", "--", ":", "-.")
    return {
        label: {"color": SERIES[i % count], "marker": MARKERS[i % count], "linestyle": styles[i // count % len(styles)]}
        for i, label in enumerate(runs)
    }


def _dices(scores: list[CaseScores], name: str) -> dict[str, float]:
    """``SITE/CASE`` → Dice of a class, or the mean over the classes."""
    if name == "mean":
        return mean_dices(scores)
    return {f"{s.site}/{s.case}": value for s in scores if (value := s.dice.get(name)) is not None}


def _pooled(scores: list[CaseScores], name: str) -> float | None:
    found = _dices(scores, name)
    return sum(found.values()) / len(found) if found else None


def _difference(
    scores: list[CaseScores], others: list[CaseScores], name: str, subjects: Mapping[str, str]
) -> Difference | None:
    mine, theirs = _dices(scores, name), _dices(others, name)
    return compare(mine, theirs, {key: subjects.get(key, key) for key in mine})
