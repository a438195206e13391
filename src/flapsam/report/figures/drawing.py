"""How charts look: matplotlib draws, and colours are left to the page's style sheet, so that it can be light or dark."""

import re
from collections.abc import Collection, Iterator, Sequence
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
"""Stand-ins that no page shows: each becomes a variable of the style sheet, with a value for light and one for dark."""
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {c: f"series-{i}" for i, c in enumerate(SERIES, 1)}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Series differ in form, too, for those who do not tell the colours apart."""
WIDTH = 10.4
"""Of most charts, in inches."""
MARKED = 20
"""Points of a line that have a marker, or a few more."""
LABEL = 22
"""Characters of a name that a chart shows."""

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
    """Within it figures take the report's style."""
    with rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def chart(figure: Figure, title: str, description: str) -> Chart:
    """A figure as SVG for a page.

    Args:
        figure: drawn in the report's style.
        title: what it shows, in a few words.
        description: what is seen in it, for those who do not see it.
    """
    buffer = StringIO()
    # Ids are hashed from this; two charts in one page must not share any.
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


def short(name: str) -> str:
    """A name on one line that leaves room for others."""
    line = " ".join(name.split())
    return line if len(line) <= LABEL else line[: LABEL - 1] + "…"


def legend(figure: Figure, entries: Sequence[tuple[str, dict]], columns: int = 7) -> None:
    """A legend under the charts, read row by row: names, and how each is drawn."""
    columns = min(columns, len(entries))
    # matplotlib fills columns first.
    ordered = [entries[index] for column in range(columns) for index in range(column, len(entries), columns)]
    handles = [Line2D([], [], **look) for _, look in ordered]
    figure.legend(handles, [short(name) for name, _ in ordered], loc="outside lower left", ncols=columns, fontsize=9)


def dice_axis(axes: Axes) -> None:
    """Dice from 0 to 1."""
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def every(points: int) -> int:
    """Of so many points on a line, every which one has a marker, so that they stay apart."""
    return max(1, points // MARKED)


def value_axis(axes: Axes, what: str) -> None:
    """A Dice or a loss: the one from 0 to 1, the other from 0 on."""
    axes.set_ylabel(what)
    if what.endswith("Dice"):
        dice_axis(axes)
    else:
        axes.set_ylim(bottom=0)


def rounds_axis(axes: Axes) -> None:
    """Rounds from 0 on, whole numbers."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")


def bytes_axis(axis: Axis, values: Collection[float]) -> None:
    """Bytes by powers of two, from below the smallest value to above the largest."""
    low, high = floor(log2(max(min(values), 1))), ceil(log2(max(*values, 2)))
    step = max(1, ceil((high - low) / 5))
    # Whole kibibytes where they can be: 2^10, 2^15, 2^20 …
    step = next((even for even in (1, 2, 5, 10) if even >= step), step)
    ticks = [2.0**power for power in range(low // step * step, high + step, step)]
    name = "x" if isinstance(axis, XAxis) else "y"
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (ticks[0], ticks[-1])})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace(".00", "")))
