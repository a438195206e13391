"""A bench as a picture: Dice against what trains and travels."""

from matplotlib import rc_context
from matplotlib.figure import Figure

from flapsam.experiments.bench import Bench, front
from flapsam.files import written_whole

BLUE, GREY = "#0072B2", "#767676"
"""Of Okabe and Ito's colours, which the colour-blind tell apart; and a grey that stands out from white by 4.5 to 1."""


def draw(bench: Bench) -> None:
    """Write ``bench.svg``: a point a federated row, the Pareto front marked; nothing where no such row is there."""
    rows = bench.rows()
    best = front(rows)
    if not best:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    common = _common([row.row.name for row in rows if row.row.mode == "federated"])
    for row in rows:
        if row.row.mode != "federated" or not row.done or row.parameters is None or row.mean_dice is None:
            continue
        colour = BLUE if row in best else GREY
        axes.plot(row.parameters, row.mean_dice, "o", color=colour)
        name = ", ".join(part for part in row.row.name.split(", ") if part not in common) or row.row.name
        axes.annotate(name, (row.parameters, row.mean_dice), (5, 4), textcoords="offset points", color=colour, fontsize=8)
    axes.step(
        [row.parameters or 0 for row in best],
        [row.mean_dice or 0 for row in best],
        where="post",
        color=BLUE,
        label="Pareto front: no other has more Dice for fewer parameters",
    )
    axes.set_xscale("log")
    axes.set_xlabel("parameters that train and travel")
    axes.set_ylabel("mean test Dice")
    axes.margins(x=0.15, y=0.1)
    figure.legend(loc="outside upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with (
        written_whole(bench.folder / "bench.svg") as temporary,
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "flapsam"}),
    ):
        figure.savefig(temporary, metadata={"Date": None, "Title": "Dice against parameters that travel"})


def _common(names: list[str]) -> set[str]:
    """Parts of the names that all have, and so tell nothing."""
    parts = [set(name.split(", ")) for name in names]
    return set.intersection(*parts) if len(parts) > 1 else set()
