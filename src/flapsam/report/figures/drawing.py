"""Style of the charts. Matplotlib draws them, and the page's style sheet sets their colours, in light and dark."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from io import StringIO
from math import ceil, floor, log2
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from flapsam.report.section import Chart
from flapsam.report.units import size

INK, MUTED, GRID = "#010100", "#010101", "#010102"
SERIES = tuple(f"#0102{index:02x}" for index in range(8))
"""Placeholder colours that no page shows. Each becomes a variable of the style sheet, with a light and a dark value."""
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {c: f"series-{i}" for i, c in enumerate(SERIES, 1)}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Marker of each series, so that series also differ for readers who cannot distinguish the colours."""
WIDTH = 10.4
"""Width of most charts, in inches."""
MARKED = 20
"""Approximate number of points of a line that have a marker."""
CHART_SITES = 40
"""Number of sites that a chart by site shows, at most."""
LABEL = 22
"""Largest number of characters of a name in a chart."""

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "font.size": 9.5,
}


@contextmanager
def chart_style() -> Iterator[None]:
    """Context in which figures have the report's style."""
    with rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def chart(figure: Figure, title: str, description: str) -> Chart:
    """Convert a figure to SVG for a page.

    Args:
        figure: a figure in the report's style.
        title: what the figure shows, in a few words.
        description: what can be seen in the figure, for screen readers.
    """
    buffer = StringIO()
    # Matplotlib hashes ids with this salt, and two charts in one page must not share any.
    with rc_context({"svg.hashsalt": sha256(f"{title}{description}".encode()).hexdigest()}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' id="[A-Za-z0-9_.]+_\d+"', "", drawn)
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", drawn)
    for colour, name in VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    head, body = drawn.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", head)
    width, _ = figure.get_size_inches()
    texts = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return Chart(
        Markup(f'{head} role="img" aria-label="{escape(f"{title}. {description}")}">{texts}{body}'), round(width * 96)
    )


def lowest(values: Mapping[str, float | None], what: str) -> tuple[list[str], str]:
    """The sites that a chart by site shows, in the order of their names, and a sentence if it does not show all of them.

    Args:
        values: site → the value by which those with the lowest are chosen. None counts as the highest.
        what: what the chosen sites have, in words.
    """
    chosen = sorted(values, key=lambda site: (values[site] is None, values[site] or 0.0, site))[:CHART_SITES]
    text = f" The chart shows {len(chosen)} of {len(values)} sites, those with {what}."
    return sorted(chosen), text if len(chosen) < len(values) else ""


def short(name: str) -> str:
    """A name on one line, cut to ``LABEL`` characters."""
    line = " ".join(name.split())
    return line if len(line) <= LABEL else line[: LABEL - 1] + "…"


def legend(figure: Figure, entries: Sequence[tuple[str, dict]], columns: int = 7) -> None:
    """Add a legend under the charts.

    Args:
        figure: the figure.
        entries: names and line styles, in reading order.
        columns: number of columns, at most.
    """
    columns = min(columns, len(entries))
    # Matplotlib fills legends column by column, but readers read row by row.
    ordered = [entries[index] for column in range(columns) for index in range(column, len(entries), columns)]
    handles = [Line2D([], [], **look) for _, look in ordered]
    figure.legend(handles, [short(name) for name, _ in ordered], loc="outside lower left", ncols=columns, fontsize=9)


def dice_axis(axes: Axes) -> None:
    """Set the vertical axis to Dice from 0 to 1."""
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def every(points: int) -> int:
    """Distance between points with a marker on a line of ``points`` points, so that markers do not overlap."""
    return max(1, points // MARKED)


def value_axis(axes: Axes, label: str) -> None:
    """Label the vertical axis and set its range: 0 to 1 for a Dice, 0 upwards for a loss."""
    axes.set_ylabel(label)
    if label.endswith("Dice"):
        dice_axis(axes)
    else:
        axes.set_ylim(bottom=0)


def rounds_axis(axes: Axes) -> None:
    """Set the horizontal axis to rounds from 0 upwards, in whole numbers."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")


def bytes_axis(axis: Axis, values: Collection[float]) -> None:
    """Set an axis to bytes on a logarithmic scale, from below the smallest value to above the largest."""
    low, high = floor(log2(max(min(values), 1))), ceil(log2(max(*values, 2)))
    step = max(1, ceil((high - low) / 5))
    # Steps that divide 10 put ticks on round sizes, such as 1 KiB (2^10), 32 KiB (2^15) and 1 MiB (2^20).
    step = next((even for even in (1, 2, 5, 10) if even >= step), step)
    ticks = [2.0**power for power in range(low // step * step, high + step, step)]
    name = "x" if isinstance(axis, XAxis) else "y"
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (ticks[0], ticks[-1])})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace(".00", "")))
