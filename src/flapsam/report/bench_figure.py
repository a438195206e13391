"""Chart of a bench: Dice against the number of parameters that train and travel."""

from matplotlib import rc_context
from matplotlib.figure import Figure

from flapsam.base.files import written_whole
from flapsam.experiments.bench import Bench, front, measured

BLUE, GREY = "#0072B2", "#767676"
"""A blue from Okabe and Ito's palette for colour-blind readers, and a grey with a contrast of 4.5 to 1 on white."""


def draw(bench: Bench) -> None:
    """Write ``bench.svg``, with one point per federated row and the Pareto front, if any federated row has results."""
    rows = bench.rows
    best = front(rows)
    if not best:
        return
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in measured(rows) if row.parameters is not None and row.mean_dice is not None]
    shown.sort(key=lambda row: -(row.mean_dice or 0))
    common = _common([row.row.name for row in shown])
    for number, row in enumerate(shown, start=1):
        colour = BLUE if row in best else GREY
        name = ", ".join(part for part in row.row.name.split(", ") if part not in common) or row.row.name
        place = (row.parameters or 0, row.mean_dice or 0)
        axes.plot(*place, "o", color=colour, label=f"{number}  {name}")
        # Numbers alternate above and below, because points with similar Dice often lie close together.
        offset = (-3, 6) if number % 2 else (-3, -13)
        axes.annotate(str(number), place, offset, textcoords="offset points", color=colour, fontsize=8)
    axes.step(
        [row.parameters or 0 for row in best],
        [row.mean_dice or 0 for row in best],
        where="post",
        color=BLUE,
        label="Pareto front: no other row has\nhigher Dice with fewer parameters",
    )
    axes.set_xscale("log")
    axes.set_xlabel("parameters that train and travel")
    axes.set_ylabel("mean test Dice")
    axes.margins(x=0.15, y=0.1)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with (
        written_whole(bench.folder / "bench.svg") as temporary,
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "flapsam"}),
    ):
        figure.savefig(temporary, metadata={"Date": None, "Title": "Dice against parameters that travel"})


def _common(names: list[str]) -> set[str]:
    """Parts that all names share, and that therefore do not distinguish them."""
    parts = [set(name.split(", ")) for name in names]
    return set.intersection(*parts) if len(parts) > 1 else set()
