"""Traffic per round and in total, compared with the paper's strategies."""

from collections.abc import Mapping, Sequence

from flapsam.federation.traffic import StrategyTraffic
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
from flapsam.report.run import Series
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, size

MEASURED = "this run, measured"


def traffic(
    up: Series, down: Series, delivered: Mapping[str, int], rounds: int, strategies: Sequence[StrategyTraffic]
) -> Section | None:
    """A chart and tables of the federation's traffic; None if nothing travelled.

    Args:
        up: bytes that each site sent in each round.
        down: bytes that each site received in each round.
        delivered: site → bytes of the result after the last round.
        rounds: number of rounds done.
        strategies: traffic of the paper's strategies in the same number of rounds.
    """
    if not up:
        return None
    sites = up.keys() | down.keys() | delivered.keys()
    everything = sum(sum(points.values()) for series in (up, down) for points in series.values()) + sum(delivered.values())
    total = everything / len(sites)
    figure = new_figure(WIDTH, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    looks, means = {}, {}
    for index, (name, series) in enumerate((("up, from a site", up), ("down, to a site", down))):
        looks[name] = {"color": SERIES[index], "marker": MARKERS[index]}
        means[name] = means_of(series)
        left.plot(list(means[name]), list(means[name].values()), markevery=every(len(means[name])), **looks[name])
    bytes_axis(left.yaxis, [value for of_each in means.values() for value in of_each.values()])
    rounds_axis(left)
    left.set_title("per packet, mean over the sites")
    legend(figure, list(looks.items()))
    bars = {**{row.strategy: row.gib * 2**30 for row in strategies}, MEASURED: total}
    colours = [SERIES[0] if name == MEASURED else MUTED for name in bars]
    right.barh(list(bars), list(bars.values()), color=colours, height=0.65)
    for name, value in bars.items():
        right.annotate(size(value), (value, name), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    bytes_axis(right.xaxis, [min(bars.values()) / 3, max(bars.values()) * 8])
    right.grid(axis="y", visible=False)
    right.set_title(f"per site in {rounds} rounds, up and down")
    return Section(
        "traffic",
        "Traffic",
        f"Measured traffic of the federation: {size(total)} per site in {rounds} rounds, up and down together. Grey bars "
        "show the traffic of the paper's strategies with this network in the same number of rounds, uncompressed.",
        [chart(figure, "Traffic per round, and in total compared with the strategies", f"In total {size(total)} per site.")],
        [_totals(bars, strategies), _per_round(up, down, delivered)],
    )


def _totals(bars: dict[str, float], strategies: Sequence[StrategyTraffic]) -> Table:
    full = bars.get("full")
    parameters = {row.strategy: f"{row.parameters:,}" for row in strategies}
    papers = {row.strategy: row.paper_name for row in strategies}
    rows = [
        [name, papers.get(name, NONE), parameters.get(name, NONE), size(value), f"{full / value:,.1f}" if full else NONE]
        for name, value in bars.items()
    ]
    head = ["strategy", "in the paper", "parameters", "per site, all rounds", "× less than full"]
    return Table("traffic-table", "Traffic per site in all rounds", head, rows, text_columns=2)


def _per_round(up: Series, down: Series, delivered: Mapping[str, int]) -> Table:
    means = [means_of(up), means_of(down)]
    rows = []
    for number in sorted(means[0].keys() | means[1].keys()):
        both = sum(points.get(number, 0) for series in (up, down) for points in series.values())
        rows.append([str(number), *(size(mean[number]) if number in mean else NONE for mean in means), size(both)])
    if delivered:
        both = sum(delivered.values())
        rows.append(["final model", NONE, size(both / len(delivered)), size(both)])
    head = ["round", "up, mean over the sites", "down, mean over the sites", "all sites, up and down"]
    return Table("traffic-rounds", "Traffic per round", head, rows, text_columns=0)
