"""Curves of the values that sites report for each round: validation Dice and training loss."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from flapsam.learning.metrics import mean
from flapsam.report.figures.drawing import (
    INK,
    MARKERS,
    MUTED,
    SERIES,
    WIDTH,
    chart,
    every,
    legend,
    new_figure,
    rounds_axis,
    value_axis,
)
from flapsam.report.run import TITLES, Series
from flapsam.report.section import Section, Table
from flapsam.report.units import number
from flapsam.run.config import Training

MEAN = "mean over the sites"


def dice_curves(validation: Mapping[str, Series]) -> Section | None:
    """Validation Dice per round and site, by mode; None without any validation."""
    return _section(
        validation,
        name="dice-per-round",
        title="Dice per round",
        axis="validation Dice",
        text="Mean Dice over the classes on each site's validation cases. Test cases are not included.",
    )


def losses(curves: Mapping[str, Series], training: Training) -> Section | None:
    """Training loss per round and site, by mode; None if no site reports its loss.

    Args:
        curves: mode → losses.
        training: the weights of the loss's terms, for the text.
    """
    return _section(
        curves,
        name="losses",
        title="Training loss",
        axis="training loss",
        text=f"{training.cross_entropy:g} · cross-entropy + {training.dice:g} · Dice loss, averaged over a round's steps.",
    )


def _section(curves: Mapping[str, Series], *, name: str, title: str, axis: str, text: str) -> Section | None:
    curves = {mode: series for mode, series in curves.items() if series}
    if not curves:
        return None
    figure = new_figure(WIDTH, 3.9)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    sites = sorted({site for series in curves.values() for site in series} - {"centralised"})
    looks = looks_of(sites)
    for axes, (mode, series) in zip(panels, curves.items(), strict=True):
        draw_curves(axes, series, looks)
        axes.set_title(TITLES[mode])
    value_axis(panels[0], axis)
    shown = list(looks.items()) if len(sites) <= len(SERIES) else [("one line per site", looks[sites[0]])]
    legend(figure, [*shown, (MEAN, {"color": INK, "linestyle": "--"})])
    last = {mode: mean(points[max(points)] for points in series.values()) for mode, series in curves.items()}
    ends = ", ".join(f"{TITLES[mode]} {number(value)}" for mode, value in last.items())
    return Section(
        name,
        title,
        text,
        [chart(figure, f"{title}, one line per site", f"Mean over the sites in the last round: {ends}.")],
        [_table(f"{name}-{mode}", f"{title}, {TITLES[mode]}", series) for mode, series in curves.items()],
    )


def looks_of(sites: list[str]) -> dict[str, dict]:
    """Site → style of its line: its own colour and marker, or a thin grey line if there are many sites."""
    if len(sites) > len(SERIES):
        return {site: {"color": MUTED, "linewidth": 0.6, "alpha": 0.6} for site in sites}
    return {site: {"color": SERIES[i], "marker": MARKERS[i]} for i, site in enumerate(sites)}


def draw_curves(axes: Axes, series: Series, looks: dict[str, dict]) -> None:
    """Draw one line per site, and the mean over the sites if there are several."""
    for site, points in series.items():
        rounds = sorted(points)
        look = looks.get(site, {"color": INK, "marker": "o"})
        axes.plot(rounds, [points[number] for number in rounds], markevery=every(len(rounds)), **look)
    if len(series) > 1:
        means = means_of(series)
        axes.plot(list(means), list(means.values()), color=INK, linestyle="--", linewidth=2)
    rounds_axis(axes)


def means_of(series: Series) -> dict[int, float]:
    """Round → mean over the sites that report a value."""
    rounds = sorted({number for points in series.values() for number in points})
    values = {number: [points[number] for points in series.values() if number in points] for number in rounds}
    return {number: sum(reported) / len(reported) for number, reported in values.items()}


def _table(name: str, caption: str, series: Series) -> Table:
    means = means_of(series)
    rows = [
        [str(round_), *(number(points.get(round_)) for points in series.values()), number(average)]
        for round_, average in means.items()
    ]
    return Table(name, caption, ["round", *series, MEAN], rows, text_columns=0)
