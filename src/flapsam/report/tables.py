"""Tables of results for the terminal."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from flapsam.base.escaping import one_line
from flapsam.experiments.audit import Audit, allowed
from flapsam.experiments.simulation import Results
from flapsam.federation.traffic import RunTraffic, StrategyTraffic
from flapsam.learning.memory import StepMemory
from flapsam.learning.metrics import CaseScores, Summary, by_site, missing_cases, rule_for_absent, summarise
from flapsam.report.own import TITLE, own_rows
from flapsam.report.run import TITLES
from flapsam.report.units import NONE, number, over, size

ALL_CASES = "all cases"
"""Name of the row over the cases of all sites."""
COUNTED = "n is the number of cases of a mean that leaves some out."


def results_tables(results: Results) -> list[Table]:
    """All tables of a simulation: Dice by site, scores by class, and traffic if anything travelled."""
    pooled = {mode: sites["pooled"] for mode, sites in results.summaries().items()}
    traffic = [traffic_table(results)] if results.traffic else []
    rows = own_rows(results.events)
    own = [own_table(rows)] if rows else []
    return [dice_table(results), class_table(pooled), *own, *traffic]


def dice_table(results: Results) -> Table:
    """Mean test Dice by site with one column per mode, and the gain of federated over local-only training."""
    summaries = results.summaries()
    rule = rule_for_absent(score for scores in results.scores.values() for score in scores)
    table = Table(title="Mean test Dice over classes")
    table.add_column("site")
    table.add_column("cases", justify="right")
    for mode in summaries:
        table.add_column(TITLES[mode], justify="right")
    compared = {"federated", "local"} <= summaries.keys()
    in_common: dict[str, Summary] = {}
    cells: list[str] = []
    if compared:
        table.add_column("gain", justify="right")
        alone = {(score.site, score.case) for score in results.scores["local"]}
        scores = [score for score in results.scores["federated"] if (score.site, score.case) in alone]
        in_common = {site: summarise(part) for site, part in by_site(scores).items()} | {"pooled": summarise(scores)}
    first = next(iter(summaries.values()))
    for site, summary in first.items():
        name = ALL_CASES if site == "pooled" else site
        # A site that never trained has no model of its own.
        row = [name, str(summary.cases), *(_dice_of(sites.get(site), summary.cases) for sites in summaries.values())]
        if compared:
            row.append(_gain(in_common.get(site), summaries["local"].get(site)))
        cells += row
        table.add_row(*map(as_text, row), style="bold" if site == "pooled" else None)
    table.caption = _explained(rule, cells)
    return table


def class_table(modes: dict[str, Summary]) -> Table:
    """Dice and 95 % Hausdorff distance over all cases with a Dice, with one row per mode and class."""
    table = Table(title="Test scores by class, over all cases")
    for column in ("mode", "class", "cases", "Dice", "HD95 (mm)"):
        table.add_column(column, justify="left" if column in ("mode", "class") else "right")
    for mode, summary in modes.items():
        for name, value in summary.dice.items():
            count = summary.dice_cases[name]
            distance = over(number(summary.hd95[name], 1), summary.hd95_cases[name], count)
            table.add_row(mode, as_text(name), str(count), number(value), distance)
    return table


def own_table(rows: Sequence[Sequence[str]]) -> Table:
    """Mean test Dice of the shared adapter and of the one that each site keeps, at every site, from ``own_rows``."""
    table = Table(title=TITLE)
    for place, column in enumerate(rows[0]):
        table.add_column(as_text(column), justify="right" if place > 1 else "left")
    for row in rows[1:]:
        table.add_row(*map(as_text, row))
    return table


def traffic_table(results: Results) -> Table:
    """Measured bytes per round and site, next to those of full fine-tuning."""
    traffic = results.traffic
    if traffic is None:
        raise ValueError("nothing travelled in this run")
    table = Table(title="Measured traffic per round and site")
    for column in ("up", "down", "full fine-tuning, each way", "reduction"):
        table.add_column(column, justify="right")
    table.add_row(size(traffic.up), size(traffic.down), size(traffic.full), f"{traffic.ratio:.1f}×")
    return table


def scores_table(scores: Sequence[CaseScores]) -> Table:
    """Dice and 95 % Hausdorff distance by site and over all cases, with one column per class."""
    pooled = summarise(scores)
    missing = missing_cases(scores)
    zeros = f" No prediction, so that the Dice is 0: {', '.join(missing)}." if missing else ""
    shown: list[str] = []
    table = Table(title="Dice (95 % Hausdorff distance in mm)")
    table.add_column("site")
    table.add_column("cases", justify="right")
    for name in [*pooled.dice, "mean"]:
        table.add_column(as_text(name), justify="right")
    sites = {site or NONE: summarise(part) for site, part in by_site(scores).items()}
    for site, summary in {**sites, ALL_CASES: pooled}.items():
        dices = [over(number(value), summary.dice_cases[name], summary.cases) for name, value in summary.dice.items()]
        distances = [over(number(value, 1), summary.hd95_cases[name], summary.cases) for name, value in summary.hd95.items()]
        cells = [f"{dice} ({distance})" for dice, distance in zip(dices, distances, strict=True)]
        table.add_row(
            as_text(site),
            str(summary.cases),
            *cells,
            mean_dice(summary),
            style="bold" if site == ALL_CASES else None,
        )
        shown += [*cells, mean_dice(summary)]
    table.caption = as_text(_explained(rule_for_absent(scores), shown) + zeros)
    return table


def _explained(rule: str, cells: Iterable[str]) -> str:
    """The rule for absent classes, and what n is if a cell has one."""
    return f"{rule} {COUNTED}" if any(" n=" in cell for cell in cells) else rule


def strategy_table(rows: Sequence[StrategyTraffic]) -> Table:
    """Number of trained parameters and traffic of each strategy."""
    table = Table()
    for column in ("strategy", "in the paper", "parameters", "GiB", "× less than full"):
        table.add_column(column, justify="left" if column in ("strategy", "in the paper") else "right")
    for row in rows:
        table.add_row(row.strategy, row.paper_name, f"{row.parameters:,}", f"{row.gib:.3f}", f"{row.less:.1f}")
    return table


def audit_table(audit: Audit) -> Table:
    """The outcome of a membership attack, beside what the adapter's differential privacy allows."""
    table = Table(title=f"Membership attack by loss, {audit.members} members and {audit.others} others")
    for column in ("", "measured", "95 % interval", "a guess", "allowed by privacy"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("AUC", number(audit.auc), f"{audit.low:.3f} to {audit.high:.3f}", "0.500", NONE)
    for part in audit.found:
        most = allowed(part.false, audit.privacy) if audit.privacy else None
        name = f"members found at {part.false:.0%} false suspicions"
        table.add_row(
            name,
            number(part.share),
            f"{part.low:.3f} to {part.high:.3f}",
            f"{part.false:.3f}",
            NONE if most is None else number(most),
        )
    return table


def prediction_table(rows: Sequence[RunTraffic]) -> Table:
    """Predicted bytes that a site sends and receives, with one row per rank."""
    first = rows[0]
    table = Table(
        title=f"Predicted traffic of a site in {first.rounds} rounds, with {first.parameters:,} trained parameters"
    )
    for column in ("rank", "up per round", "down per round", "total", "full fine-tuning in fp32", "reduction"):
        table.add_column(column, justify="right")
    for row in rows:
        rounds = (size(row.up / row.rounds), size(row.down / row.rounds), size(row.up + row.down), size(row.full))
        table.add_row(str(row.rank), *rounds, f"{row.ratio:.1f}×")
    return table


def memory_table(rows: Sequence[StepMemory]) -> Table:
    """Memory of a training step in GiB, by the number of slices that go through the network at once."""
    table = Table()
    for column in ("slices at once", "GiB", "GiB with checkpointing"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row.slices), *(f"{value / 2**30:.2f}" for value in (row.straight, row.checkpointing)))
    return table


def plain_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """A table of rows that share their keys, which are the head."""
    table = Table()
    for column in rows[0]:
        table.add_column(as_text(column), overflow="fold")
    for row in rows:
        table.add_row(*map(as_text, row.values()))
    return table


def as_text(text: str) -> Text:
    """A cell that shows the text as it is, without interpreting markup or control characters."""
    return Text(one_line(text))


def mean_dice(summary: Summary) -> str:
    """Mean Dice over the classes, with its number of cases if some have no Dice."""
    return over(number(summary.mean_dice), summary.mean_dice_cases, summary.cases)


def _dice_of(summary: Summary | None, cases: int) -> str:
    """Mean Dice over the classes, with its number of cases if that is not the row's."""
    return over(number(summary.mean_dice), summary.mean_dice_cases, cases) if summary else NONE


def _gain(federated: Summary | None, local: Summary | None) -> str:
    if federated is None or local is None or federated.mean_dice is None or local.mean_dice is None:
        return NONE
    return f"{federated.mean_dice - local.mean_dice:+.3f}"
