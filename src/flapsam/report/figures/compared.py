"""Charts that compare several runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flapsam.experiments.paired import Difference, compare
from flapsam.learning.metrics import CaseScores, rule_for_absent
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
from flapsam.report.run import TITLES, Series
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, interval, number, size
from flapsam.run.config import RunConfig
from flapsam.run.reading import flat


@dataclass(frozen=True)
class Curve:
    """A value per round that a chart of several runs draws."""

    section: str
    """Id of the section in the page."""
    title: str
    axis: str
    """Label of the vertical axis."""


DICE = Curve("dice-per-round", "Dice per round", "validation Dice")
LOSS = Curve("losses", "Training loss", "training loss")


@dataclass(frozen=True)
class SiteTraffic:
    """Traffic of a site in a whole run, the mean over the sites."""

    rounds: int
    """Number of rounds done."""
    bytes: float
    """Bytes in all rounds, sent and received."""


def overlaid(series: Mapping[str, Series], mode: str, curve: Curve) -> Section | None:
    """A chart with one line per run, the mean over its sites by round; None if no run has any values.

    Args:
        series: run → the series of its sites.
        mode: mode of the series, for the text.
        curve: the value that the series hold.
    """
    means = {label: points for label, sites in series.items() if (points := means_of(sites))}
    if not means:
        return None
    figure = new_figure(WIDTH, 3.9)
    axes = figure.subplots()
    looks = _looks(series)
    for label, points in means.items():
        axes.plot(list(points), list(points.values()), markevery=every(len(points)), **looks[label])
    value_axis(axes, curve.axis)
    rounds_axis(axes)
    legend(figure, [(label, looks[label]) for label in means])
    rounds = sorted({round_ for points in means.values() for round_ in points})
    rows = [[str(round_), *(number(points.get(round_)) for points in means.values())] for round_ in rounds]
    ends = ", ".join(f"{label} {number(points[max(points)])}" for label, points in means.items())
    return Section(
        curve.section,
        curve.title,
        f"Mean over the sites, {TITLES[mode]} training.",
        [chart(figure, f"{curve.title}, one line per run", f"In the last round: {ends}.")],
        [Table(f"{curve.section}-table", curve.title, ["round", *means], rows, text_columns=0)],
    )


def dice_by_class(scores: Mapping[str, Sequence[CaseScores]], mode: str, subjects: Mapping[str, str]) -> Section | None:
    """Test Dice of every run by class, and its paired difference from the first run; None if no run is tested.

    Args:
        scores: run → its test scores, which may be empty.
        mode: mode of the scores, for the text.
        subjects: ``SITE/CASE`` → subject, for cases with a known subject. Every other case counts as its own subject.
    """
    looks = _looks(scores)
    scores = {label: cases for label, cases in scores.items() if cases}
    if not scores:
        return None
    classes = list(dict.fromkeys(name for cases in scores.values() for score in cases for name in score.dice))
    rows: list[list[str]] = []
    figure = new_figure(WIDTH, 1.4 + 0.34 * (len(classes) + 1))
    axes = figure.subplots()
    lines = ["mean", *classes]
    for label, cases in scores.items():
        values = [_pooled(cases, name) for name in lines]
        places = [(value, row) for row, value in enumerate(values) if value is not None]
        look = {**looks[label], "linestyle": "none", "markersize": 6}
        axes.plot([value for value, _ in places], [row for _, row in places], **look)
    axes.set_yticks(range(len(lines)), [short(name) for name in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(f"test Dice, {TITLES[mode]}")
    legend(figure, [(label, {**looks[label], "linestyle": "none"}) for label in scores])
    first = next(iter(scores))
    for label, cases in scores.items():
        for name in lines:
            difference = NONE if label == first else interval(_difference(cases, scores[first], name, subjects))
            common = len(_dices(cases, name).keys() & _dices(scores[first], name).keys())
            rows.append([label, name, str(len(_dices(cases, name))), number(_pooled(cases, name)), str(common), difference])
    head = ["run", "class", "cases", "Dice", "cases in common", f"difference from {first}"]
    means = ", ".join(f"{label} {number(_pooled(cases, 'mean'))}" for label, cases in scores.items())
    caption = f"Test Dice, and paired differences from {first}"
    return Section(
        "test",
        "Test Dice",
        f"Mean over all test cases. Differences from {first} are means over the cases in common, with 95 % "
        f"intervals from a bootstrap over subjects. {rule_for_absent(s for cases in scores.values() for s in cases)}",
        [chart(figure, "Test Dice by class and run", f"Mean over the classes: {means}.")],
        [Table("differences-table", caption, head, rows, text_columns=2, opened=True)],
    )


def traffic_of_each(runs: Mapping[str, SiteTraffic | None]) -> Section | None:
    """A bar chart of a site's traffic in every federated run; None if no run is federated."""
    looks = _looks(runs)
    totals = {label: total for label, total in runs.items() if total}
    if not totals:
        return None
    figure = new_figure(WIDTH, 1.2 + 0.34 * len(totals))
    axes = figure.subplots()
    for row, (label, total) in enumerate(totals.items()):
        axes.barh(row, total.bytes, color=looks[label]["color"], height=0.6)
        axes.annotate(size(total.bytes), (total.bytes, row), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(totals)), [short(label) for label in totals])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    values = [total.bytes for total in totals.values()]
    bytes_axis(axes.xaxis, [min(values) / 3, max(values) * 8])
    rows = [[label, str(total.rounds), size(total.bytes)] for label, total in totals.items()]
    summary = ", ".join(f"{label} {size(total.bytes)}" for label, total in totals.items())
    return Section(
        "traffic",
        "Traffic",
        "Measured traffic per site in all rounds, sent and received.",
        [chart(figure, "Traffic per site by run", summary)],
        [Table("traffic-table", "Traffic per site", ["run", "rounds", "traffic per site"], rows)],
    )


def configurations(configs: Mapping[str, RunConfig]) -> Section:
    """The fields in which the runs' configurations differ."""
    trees = {label: flat(config, "output", "notes", "bench") for label, config in configs.items()}
    fields = list(dict.fromkeys(field for tree in trees.values() for field in tree))
    different = [field for field in fields if len({tree.get(field, NONE) for tree in trees.values()}) > 1]
    rows = [[field, *(tree.get(field, NONE) for tree in trees.values())] for field in different]
    text = "All other fields are equal." if different else "The configurations of the runs are equal."
    table = Table("fields-table", "Fields that differ", ["field", *trees], rows, text_columns=len(trees) + 1, opened=True)
    return Section("fields", "Configurations", text, tables=[table] if different else [])


def _looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    count = len(SERIES)
    styles = ("-", "--", ":", "-.")
    return {
        label: {"color": SERIES[i % count], "marker": MARKERS[i % count], "linestyle": styles[i // count % len(styles)]}
        for i, label in enumerate(labels)
    }


def _dices(scores: Sequence[CaseScores], name: str) -> dict[str, float]:
    """``SITE/CASE`` → Dice of a class, or for ``mean`` the mean over the classes."""
    if name == "mean":
        return mean_dices(scores)
    return {f"{s.site}/{s.case}": value for s in scores if (value := s.dice.get(name)) is not None}


def _pooled(scores: Sequence[CaseScores], name: str) -> float | None:
    dices = _dices(scores, name)
    return sum(dices.values()) / len(dices) if dices else None


def _difference(
    scores: Sequence[CaseScores], reference: Sequence[CaseScores], name: str, subjects: Mapping[str, str]
) -> Difference | None:
    dices = _dices(scores, name)
    return compare(dices, _dices(reference, name), {key: subjects.get(key, key) for key in dices})
