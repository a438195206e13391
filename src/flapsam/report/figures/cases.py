"""Test Dice of every case as points over boxes, by site, class and mode."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from flapsam.learning.metrics import by_site, rule_for_absent, summarise
from flapsam.report.figures.drawing import (
    GRID,
    INK,
    MARKERS,
    SERIES,
    WIDTH,
    chart,
    dice_axis,
    legend,
    lowest,
    new_figure,
    short,
)
from flapsam.report.run import TITLES, Scores
from flapsam.report.section import CaseName, Section, Table
from flapsam.report.units import number

SPREAD = 0.75
"""Width of all boxes of a site together, where the distance between sites is 1."""


def dice_per_case(scores: Scores, classes: Sequence[str]) -> Section | None:
    """A chart and a table of the test Dice of every case; None if no case is tested.

    Args:
        scores: mode → test scores.
        classes: names of the classes.
    """
    if not scores:
        return None
    by_mode = {mode: by_site(cases) for mode, cases in scores.items()}
    main = by_mode.get("federated") or next(iter(by_mode.values()))
    every = {site for parts in by_mode.values() for site in parts}
    sites, note = lowest({site: summarise(main.get(site, [])).mean_dice for site in every}, "the lowest Dice")
    figure = new_figure(max(WIDTH, 1.2 + 0.28 * len(sites) * (len(scores) + 1)), 0.9 + 2.3 * len(classes))
    panels = figure.subplots(len(classes), 1, sharex=True, squeeze=False)[:, 0]
    width = SPREAD / len(scores)
    for axes, name in zip(panels, classes, strict=True):
        for index, parts in enumerate(by_mode.values()):
            for place, site in enumerate(sites):
                values = [value for score in parts.get(site, []) if (value := score.dice[name]) is not None]
                if values:
                    _box(axes, values, place - SPREAD / 2 + width * (index + 0.5), width, SERIES[index], MARKERS[index])
        axes.set_title(name if len(name) < 60 else short(name))
        axes.set_ylabel("test Dice")
        dice_axis(axes)
        axes.grid(axis="x", visible=False)
    panels[-1].set_xticks(range(len(sites)), [short(site) for site in sites], rotation=90 if len(sites) > 8 else 0)
    panels[-1].set_xlim(-0.6, len(sites) - 0.4)
    looks = [{"color": SERIES[i], "marker": MARKERS[i], "linestyle": "none"} for i in range(len(scores))]
    legend(figure, [(TITLES[mode], look) for mode, look in zip(scores, looks, strict=True)])
    count = len({(score.site, score.case) for cases in scores.values() for score in cases})
    return Section(
        "cases",
        "Dice per case",
        "Each point is a test case. A box spans the middle half of a site's cases, and the line in it is their median. Test "
        "cases were used only once, after the last round. "
        f"{rule_for_absent(s for cases in scores.values() for s in cases)}{note}",
        [
            chart(
                figure, "Test Dice per case by site and class", f"{count} cases at {len(every)} sites, listed in the table."
            )
        ],
        [_table(scores, classes)],
    )


def _box(axes: Axes, values: list[float], centre: float, width: float, colour: str, marker: str) -> None:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    axes.bar(centre, high - low, 0.8 * width, low, color=GRID, edgecolor=colour, linewidth=0.8, zorder=1)
    axes.plot([centre - 0.4 * width, centre + 0.4 * width], [middle, middle], color=INK, linewidth=1.6, zorder=2)
    # Points are spread over the box by their index, so that a run always has the same picture.
    spread = (np.arange(len(values)) * 0.618 % 1 - 0.5) * 0.6 * width
    axes.plot(centre + spread, values, marker, color=colour, markersize=3.4, alpha=0.85, zorder=3)


def _table(scores: Scores, classes: Sequence[str]) -> Table:
    several = len(scores) > 1
    head, columns = ["site", "case"], []
    for mode, cases in scores.items():
        prefix = f"{TITLES[mode]}: " if several else ""
        head += [f"{prefix}{name}" for name in classes] + [f"{prefix}{name}, HD95 (mm)" for name in classes]
        columns.append({(score.site, score.case): score for score in cases})
    rows = []
    for site, case in sorted({key for column in columns for key in column}):
        cells = [site, CaseName(site, case)]
        for column in columns:
            score = column.get((site, case))
            cells += [number(score.dice[name] if score else None) for name in classes]
            cells += [number(score.hd95[name] if score else None, 1) for name in classes]
        rows.append(cells)
    return Table("cases-table", "Dice and 95 % Hausdorff distance of every test case", head, rows, text_columns=2)
