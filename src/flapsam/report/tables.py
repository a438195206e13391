"""Tables of results for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from flapsam.base.escaping import one_line
from flapsam.experiments.audit import Audit, allowed
from flapsam.experiments.calibration import Calibration
from flapsam.experiments.simulation import Results
from flapsam.federation.hospitals.aggregates import pooled_dice
from flapsam.federation.traffic import RunTraffic, StrategyTraffic
from flapsam.learning.confidence import SURELY
from flapsam.learning.memory import StepMemory
from flapsam.learning.metrics import (
    CaseScores,
    Summary,
    by_site,
    few_patients,
    missing_cases,
    rule_for_absent,
    spread,
    summarise,
)
from flapsam.report import site_tests
from flapsam.report.measured import measure_rows, rules, worst_site
from flapsam.report.own import TITLE, own_rows
from flapsam.report.run import TITLES
from flapsam.report.units import NONE, number, over, size, with_interval
from flapsam.run.ledger import Event

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
    several = len(results.scores) > 1
    notes = [worst_site(spread(scores), TITLES[mode] if several else "") for mode, scores in results.scores.items()]
    table.caption = as_text(" ".join(filter(None, [_explained(rule, cells), *notes, few_patients(first["pooled"])])))
    return table


def class_table(modes: Mapping[str, Summary]) -> Table:
    """All measures over all cases, with one row per mode and class or region."""
    table = _of_rows("Test scores over all cases", measure_rows(modes, intervals=False))
    table.caption = as_text(" ".join(rules(list(modes.values()))))
    return table


def own_table(rows: Sequence[Sequence[str]]) -> Table:
    """Mean test Dice of the shared adapter and of the one that each site keeps, at every site, from ``own_rows``."""
    return _of_rows(TITLE, rows)


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


def scores_tables(scores: Sequence[CaseScores]) -> list[Table]:
    """Dice by site and class, and all measures over all cases."""
    return [site_table(scores), class_table({"": summarise(scores)})]


def site_table(scores: Sequence[CaseScores]) -> Table:
    """Dice by site and over all cases, with one column per class, region and mean."""
    pooled = summarise(scores)
    missing = missing_cases(scores)
    zeros = f"No prediction, so that the Dice is 0: {', '.join(missing)}." if missing else ""
    shown: list[str] = []
    table = Table(title="Dice")
    table.add_column("site")
    for name in ["cases", "patients", *pooled.dice, *pooled.means, "mean"]:
        table.add_column(as_text(name), justify="right")
    sites = {site or NONE: summarise(part) for site, part in by_site(scores).items()}
    for site, summary in {**sites, ALL_CASES: pooled}.items():
        means = [*(summary.measures["dice"].get(name) for name in pooled.dice), *summary.means.values()]
        dices = [over(number(mean.value), mean.cases, summary.cases) if mean else NONE for mean in means]
        cells = [*dices, with_interval(summary.mean, cases=summary.cases)]
        style = "bold" if site == ALL_CASES else None
        table.add_row(as_text(site), str(summary.cases), str(summary.patients), *map(as_text, cells), style=style)
        shown += cells
    notes = [_explained(rule_for_absent(scores), shown), zeros, worst_site(spread(scores)), few_patients(pooled)]
    table.caption = as_text(" ".join(filter(None, notes)))
    return table


def site_tests_tables(events: Sequence[Event], adapters: Sequence[str] = ()) -> list[Table]:
    """Test scores that hospitals have told, and the differences between several adapters.

    Args:
        events: the ledger of a run between hospitals.
        adapters: the adapters' names.
    """
    tables = []
    for title, rows in (
        ("Test scores at the sites", site_tests.site_rows(events, adapters)),
        ("Differences on the same cases", site_tests.difference_rows(events, adapters)),
    ):
        if rows:
            tables.append(_of_rows(title, rows))
    if tables:
        tables[-1].caption = as_text(site_tests.about(events))
    return tables


def site_tests_json(events: Sequence[Event], adapters: Sequence[str] = ()) -> list[dict[str, object]]:
    """The same scores for other programs: one entry per adapter, with the sites' scores and their mean Dice."""
    entries = []
    for place, sites in site_tests.by_round(events).items():
        whole = pooled_dice(site_tests.mean_dices(sites))
        entries.append(
            {
                "adapter": site_tests.name_of(adapters, place),
                "sites": {site: scores.model_dump() if scores else None for site, scores in sites.items()},
                "mean": asdict(whole) if whole else None,
            }
        )
    return entries


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


def calibration_tables(calibration: Calibration) -> list[Table]:
    """What a calibration found: the Dice that follows from the expected one, and how often probabilities are right."""
    line = calibration.line
    dices = Table(title=f"Dice that follows from the probabilities, {line.patients} patients")
    for column in ("mean expected", "mean measured", "slope", "95 % of new patients", "rank correlation"):
        dices.add_column(column, justify="right")
    _, low, high = line.dice(line.centre)
    dices.add_row(
        number(line.centre),
        number(line.level),
        f"{line.slope:.2f}",
        f"{low:.3f} to {high:.3f}",
        number(calibration.rank_correlation),
    )
    voxels = Table(title=f"Voxels that are background with less than {SURELY:.0%}")
    for column in ("mean probability", "right", "voxels"):
        voxels.add_column(column, justify="right")
    for probability, right, count in calibration.reliability:
        voxels.add_row(number(probability), number(right), f"{count:,}")
    return [dices, voxels]


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


def _of_rows(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of a head and rows, of which the first two columns hold text and the others numbers."""
    table = Table(title=title)
    for place, column in enumerate(rows[0]):
        table.add_column(as_text(column), justify="left" if place < 2 else "right")
    for row in rows[1:]:
        table.add_row(*map(as_text, row))
    return table


def as_text(text: str) -> Text:
    """A cell that shows the text as it is, without interpreting markup or control characters."""
    return Text(one_line(text))


def _mean_dice(summary: Summary, cases: int) -> str:
    """Mean Dice over the classes, with its number of cases if that is not ``cases``."""
    return over(number(summary.mean_dice), summary.mean.cases if summary.mean else 0, cases)


def _dice_of(summary: Summary | None, cases: int) -> str:
    """Mean Dice over the classes, with its number of cases if that is not the row's."""
    return _mean_dice(summary, cases) if summary else NONE


def _gain(federated: Summary | None, local: Summary | None) -> str:
    if federated is None or local is None or federated.mean_dice is None or local.mean_dice is None:
        return NONE
    return f"{federated.mean_dice - local.mean_dice:+.3f}"
