"""What travelled, round by round and in all, beside what the paper's strategies would have sent."""

from flapsam.errors import FlapsamError
from flapsam.report.figures.curves import means_of
from flapsam.report.figures.drawing import (
    MARKERS,
    MUTED,
    SERIES,
    WIDTH,
    bytes_axis,
    chart,
    every,
    legend,
    new_figure,
    rounds_axis,
)
from flapsam.report.run import Run, Series
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, size
from flapsam.traffic import StrategyTraffic, strategy_table

MEASURED = "this run, measured"


def traffic(run: Run) -> Section | None:
    """Bytes of the federation; None where nothing travelled."""
    up, down = run.bytes_of("bytes_up"), run.bytes_of("bytes_down")
    if not up:
        return None
    delivered = run.delivered
    sites = up.keys() | down.keys() | delivered.keys()
    total = run.travelled / len(sites)
    rounds = run.rounds("federated")
    strategies = _strategies(run, rounds)
    figure = new_figure(WIDTH, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    looks, means = {}, {}
    for index, (name, series) in enumerate((("up, from a site", up), ("down, to a site", down))):
        looks[name] = {"color": SERIES[index], "marker": MARKERS[index]}
        means[name] = means_of(series)
        left.plot(list(means[name]), list(means[name].values()), markevery=every(len(means[name])), **looks[name])
    bytes_axis(left.yaxis, [value for of_each in means.values() for value in of_each.values()])
    rounds_axis(left)
    left.set_title("a packet, mean of the sites")
    legend(figure, list(looks.items()))
    bars = {**{row.strategy: row.gib * 2**30 for row in strategies}, MEASURED: total}
    colours = [SERIES[0] if name == MEASURED else MUTED for name in bars]
    right.barh(list(bars), list(bars.values()), color=colours, height=0.65)
    for name, value in bars.items():
        right.annotate(size(value), (value, name), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    bytes_axis(right.xaxis, [min(bars.values()) / 3, max(bars.values()) * 8])
    right.grid(axis="y", visible=False)
    right.set_title(f"a site in {rounds} rounds, both ways")
    return Section(
        "traffic",
        "Traffic",
        f"Measured packets of the federation: {size(total)} a site in {rounds} rounds, both ways together. Grey bars: what "
        "the paper's strategies would send for this network in as many rounds, uncompressed.",
        [chart(figure, "Traffic per round, and in total beside the strategies", f"In all {size(total)} a site.")],
        [_totals(bars, strategies), _per_round(up, down, delivered)],
    )


def _strategies(run: Run, rounds: int) -> list[StrategyTraffic]:
    config = run.config
    try:
        return strategy_table(
            config.backbone.name,
            image_size=config.samples.size,
            classes=len(config.data.classes),
            rank=config.lora.rank,
            rounds=max(rounds, 1),
        )
    except FlapsamError:
        # A backbone that this version does not know: what was measured is still worth showing.
        return []


def _totals(bars: dict[str, float], strategies: list[StrategyTraffic]) -> Table:
    full = bars.get("full")
    parameters = {row.strategy: f"{row.parameters:,}" for row in strategies}
    papers = {row.strategy: row.paper_name for row in strategies}
    rows = [
        [name, papers.get(name, NONE), parameters.get(name, NONE), size(value), f"{full / value:,.1f}" if full else NONE]
        for name, value in bars.items()
    ]
    head = ["strategy", "in the paper", "parameters", "a site, all rounds", "× less than full"]
    return Table("traffic-table", "Traffic of a site in all rounds", head, rows, text_columns=2)


def _per_round(up: Series, down: Series, delivered: dict[str, int]) -> Table:
    means = [means_of(up), means_of(down)]
    rows = []
    for one in sorted(means[0].keys() | means[1].keys()):
        every = sum(points.get(one, 0) for series in (up, down) for points in series.values())
        rows.append([str(one), *(size(mean[one]) if one in mean else NONE for mean in means), size(every)])
    if delivered:
        every = sum(delivered.values())
        rows.append(["the end", NONE, size(every / len(delivered)), size(every)])
    head = ["round", "up, mean of the sites", "down, mean of the sites", "all sites, both ways"]
    return Table("traffic-rounds", "Traffic of each round", head, rows, text_columns=0)
