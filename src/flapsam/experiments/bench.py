"""Many runs, one table: strategies × modes × aggregators × seeds, with one cell for each combination.

A cell is a simulation of its own in ``cells/NAME``. Once it is done, its result is written to ``cells/NAME.json`` and the
run's state is removed. An interrupted bench therefore resumes where it stopped, even inside a cell, and cells can be
computed on several machines and collected in one folder.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from flapsam.base.environment import forget_peak, peak_bytes
from flapsam.base.errors import FlapsamError
from flapsam.base.files import InUseError, alone, size_of, write_text
from flapsam.experiments.paired import Difference, compare, holm
from flapsam.experiments.simulation import Results, simulate
from flapsam.federation.preparation import resolve, with_threads
from flapsam.learning.metrics import MEASURES, CaseScores, Mean, Spread, by_site, mean, rule_for_absent, spread_of, summarise
from flapsam.run.config import Data, Grid, RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, Cohort, Fitted, RoundClosed, bytes_sent, nearly_final
from flapsam.run.observer import Observer
from flapsam.run.reading import changed, fingerprint
from flapsam.sites import CaseList, Site, list_cases, read_sites

LOCK = "cell.lock"
"""Name of the file in a cell's folder that is locked while the cell is computed."""
LOOK_SECONDS = 2
"""Time between two looks at the cells of other processes."""


@dataclass(frozen=True)
class Row:
    """A combination of strategy, mode, aggregator and variant, shared by cells with different seeds and unseen sites."""

    strategy: str
    mode: str
    aggregator: str
    variant: str = ""

    @property
    def name(self) -> str:
        """The row's name, in tables and in file names."""
        return ", ".join(part for part in (self.strategy, self.variant, self.mode, self.aggregator) if part)


@dataclass(frozen=True)
class Cell:
    """One run of a bench."""

    row: Row
    seed: int
    unseen: str = ""
    """The site that does not train, and the only one whose test scores are kept; empty if all sites train."""

    @property
    def name(self) -> str:
        """The cell's name, unique in its bench."""
        return f"{self.row.name}, seed {self.seed}" + (f", without {self.unseen}" if self.unseen else "")


@dataclass(frozen=True)
class CellResult:
    """The result of a cell."""

    cell: Cell
    scores: list[CaseScores]
    subjects: dict[str, str]
    """``SITE/CASE`` → subject."""
    parameters: int
    """Number of parameters that train, and that travel in a federation."""
    bytes_up: float
    """Bytes that a site sends over all rounds, on average; 0 without a federation. In an ensemble, its adapter's size."""
    bytes_down: float
    """Bytes that a site receives over all rounds, on average; 0 without a federation. In an ensemble, the size of the
    others' adapters."""
    seconds: float
    """Seconds of all rounds, with all sites one after another."""
    peak_bytes: int | None
    """Peak memory of the process during the cell; None where the system does not report it."""
    bytes_95: float | None = None
    """Bytes up and down of a site until 95 % of the final validation Dice; None if fewer than two rounds were validated."""

    def with_subjects(self) -> list[CaseScores]:
        """The scores with their patients, which cells of earlier versions hold beside them."""
        return [replace(score, subject=self.subjects[f"{score.site}/{score.case}"]) for score in self.scores]


@dataclass(frozen=True)
class RowSummary:
    """A row of the table, which summarises the row's cells."""

    row: Row
    planned: int
    """Number of planned seeds."""
    done: int
    """Number of seeds that have been computed. If 0, the other fields are empty."""
    dice: dict[str, float | None]
    """Class → Dice, the mean over the cases and then over the seeds."""
    mean_dice: float | None
    hd95: dict[str, float | None]
    """Class → 95 % Hausdorff distance in mm, averaged as ``dice``."""
    sites: dict[str, float | None]
    """Site → mean Dice of its cases."""
    unseen: dict[str, float | None]
    """Site → mean Dice of its cases in the runs that leave the site out of training."""
    unseen_dice: float | None
    """Mean Dice over the cases of all sites, each from the run without its site; None until each has been left out."""
    gain: Difference | None
    """Federated minus local-only Dice with the same strategy: the paper's collaborative gain."""
    difference: Difference | None
    """Difference from the first row."""
    parameters: int | None
    bytes_up: float | None
    bytes_down: float | None
    seconds: float | None
    peak_bytes: int | None
    bytes_95: float | None = None
    """Bytes up and down of a site until 95 % of the final validation Dice."""
    cases: int = 0
    """Number of scored cases, summed over the seeds."""
    dice_cases: dict[str, int] = field(default_factory=dict)
    """Class → number of these cases that its Dice is over."""
    mean: Mean | None = None
    """Mean Dice over the cases of all seeds, with its 95 % interval over patients."""
    p: float | None = None
    """p-value of the difference from the first row, corrected for the number of rows (Holm)."""
    measures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Measure other than Dice and HD95 → class → mean, averaged as ``dice``."""
    missed: dict[str, int] = field(default_factory=dict)
    """Class → number of cases, summed over the seeds, in which the prediction lacks it."""
    spurious: dict[str, int] = field(default_factory=dict)
    """Class → number of cases in which the prediction alone has it."""
    counts_missed: bool = True
    """Whether all cells say what was missed. Cells of earlier versions do not, and leave it out of the mean distance."""
    spread: Spread | None = None
    """The best and the worst site."""
    absent: str = ""
    """A sentence that names the Dice of classes that are in neither the truth nor the prediction of a case."""


@dataclass(frozen=True)
class Bench:
    """The planned cells of a bench, and the results of those that have been computed."""

    folder: Path
    classes: list[str]
    cells: list[Cell]
    results: dict[Cell, CellResult]

    @cached_property
    def rows(self) -> list[RowSummary]:
        """The rows of the table, in the order of the grids."""
        rows = list(dict.fromkeys(cell.row for cell in self.cells))
        summaries = [self._summary(row, rows[0]) for row in rows]
        corrected = holm([summary.difference.p if summary.difference else None for summary in summaries])
        return [replace(summary, p=p) for summary, p in zip(summaries, corrected, strict=True)]

    def _summary(self, row: Row, first: Row) -> RowSummary:
        planned = [cell for cell in self.cells if cell.row == row]
        seen = [self.results[cell] for cell in planned if not cell.unseen and cell in self.results]
        unseen = [self.results[cell] for cell in planned if cell.unseen and cell in self.results]
        all_left_out = len(unseen) == sum(bool(cell.unseen) for cell in planned)
        summaries = [summarise(result.scores) for result in seen]
        classes = list(summaries[0].dice) if summaries else []
        alone = Row(row.strategy, "local", "", row.variant)
        return RowSummary(
            row=row,
            planned=sum(not cell.unseen for cell in planned),
            done=len(seen),
            dice={name: mean(summary.dice.get(name) for summary in summaries) for name in classes},
            mean_dice=mean(summary.mean_dice for summary in summaries),
            hd95={name: mean(summary.hd95.get(name) for summary in summaries) for name in classes},
            sites=_by_site(seen),
            unseen=_by_site(unseen),
            unseen_dice=summarise([score for result in unseen for score in result.scores]).mean_dice
            if all_left_out
            else None,
            gain=self._difference(row, alone) if row.mode == "federated" else None,
            difference=self._difference(row, first) if row != first else None,
            parameters=seen[0].parameters if seen else None,
            bytes_up=mean(result.bytes_up for result in seen),
            bytes_down=mean(result.bytes_down for result in seen),
            seconds=mean(result.seconds for result in seen),
            peak_bytes=max((result.peak_bytes for result in seen if result.peak_bytes), default=None),
            bytes_95=mean(result.bytes_95 for result in seen),
            cases=sum(summary.cases for summary in summaries),
            dice_cases={
                name: sum(known.cases for summary in summaries if (known := summary.measures["dice"].get(name)))
                for name in classes
            },
            mean=summarise([score for result in seen for score in result.with_subjects()]).mean,
            measures={
                measure: {name: mean(summary.values(measure).get(name) for summary in summaries) for name in classes}
                for measure in MEASURES
                if measure not in ("dice", "hd95") and any(measure in summary.measures for summary in summaries)
            },
            missed={name: sum(summary.missed.get(name, 0) for summary in summaries) for name in classes},
            spurious={name: sum(summary.spurious.get(name, 0) for summary in summaries) for name in classes},
            counts_missed=all(score.outcome for result in seen for score in result.scores),
            spread=spread_of(_by_site(seen)),
            absent=rule_for_absent(score for result in (*seen, *unseen) for score in result.scores),
        )

    def _difference(self, first: Row, second: Row) -> Difference | None:
        """Difference of mean Dice between two rows, paired by seed and case."""
        scores: dict[Row, dict[str, float]] = {first: {}, second: {}}
        subjects = {}
        for cell, result in self.results.items():
            if cell.row not in scores or cell.unseen:
                continue
            for score in result.scores:
                value = score.mean_dice
                if value is not None:
                    place = f"{score.site}/{score.case}"
                    scores[cell.row][f"{cell.seed} {place}"] = value
                    subjects[f"{cell.seed} {place}"] = f"{score.site}/{result.subjects[place]}"
        return compare(scores[first], scores[second], subjects)


def front(rows: Sequence[RowSummary]) -> list[RowSummary]:
    """Federated rows on the Pareto front of few parameters and high Dice, with the fewest parameters first."""
    best, efficient = -1.0, []
    for row in sorted(measured(rows), key=lambda row: (row.parameters, -(row.mean_dice or 0))):
        if row.mean_dice is not None and row.mean_dice > best:
            best = row.mean_dice
            efficient.append(row)
    return efficient


@dataclass(frozen=True)
class Suggestion:
    """The row that a bench suggests, and the row with the best Dice."""

    cheapest: RowSummary
    """The row with the fewest parameters whose Dice is close to the best."""
    best: RowSummary
    """The row with the highest Dice."""
    missing: list[str]
    """Names of federated rows that are not complete, so that the suggestion may change."""


def suggest(rows: Sequence[RowSummary], tolerance: float) -> Suggestion:
    """Suggest the federated row with the fewest parameters whose Dice is within ``tolerance`` of the best.

    Raises:
        FlapsamError: no federated row has been computed.
    """
    candidates = front(rows)
    if not candidates:
        raise FlapsamError(
            "there is nothing to suggest, because no federated row has been computed; run flapsam bench first"
        )
    best = candidates[-1]
    cheapest = next(row for row in candidates if (row.mean_dice or 0) >= (best.mean_dice or 0) - tolerance)
    missing = [row.row.name for row in rows if row.row.mode == "federated" and row.done < row.planned]
    return Suggestion(cheapest, best, missing)


def measured(rows: Sequence[RowSummary]) -> list[RowSummary]:
    """The federated rows that have results."""
    return [row for row in rows if row.row.mode == "federated" and row.done]


class Folds:
    """The sites of a bench's runs. A data folder is searched once, however many seeds and variants read it."""

    def __init__(self) -> None:
        self._listed: dict[str, CaseList] = {}

    def sites(self, data: Data, seed: int) -> list[Site]:
        """Read the sites of a run, as ``read_sites``.

        Raises:
            FlapsamError: as for ``read_sites``.
        """
        key = f"{data.layout} {data.path}"
        if key not in self._listed:
            self._listed[key] = list_cases(data.path, data.layout)
        return read_sites(data, seed, self._listed[key])


def cells_of(config: RunConfig, folds: Folds | None = None) -> dict[Cell, RunConfig]:
    """The cells of a run's grids, in order, each with its own configuration.

    Args:
        config: the run and its grids.
        folds: the sites of each seed, if they have been read before.

    Raises:
        FlapsamError: a grid holds an unknown name, or a variant an unknown field.
    """
    folds = folds or Folds()
    cells: dict[Cell, RunConfig] = {}
    for grid in config.bench:
        for cell, changes in _combinations(grid, config, folds):
            if cell not in cells:
                cells[cell] = resolve(changed(config, changes))
    return cells


def bench(
    config: RunConfig,
    *,
    only: str = "*",
    shard: tuple[int, int] = (0, 1),
    minutes: float | None = None,
    workers: int = 1,
    observer: Observer | None = None,
) -> Bench:
    """Compute the cells that have no result yet. Several processes may share the folder, and each cell is computed once.

    A cell that another process is computing comes last. If that process dies, this one continues its cell.

    Args:
        config: the run and its grids.
        only: a shell-style pattern for the names of the cells to compute.
        shard: compute only every so many of these cells: the number of the first one, from 0, and how many to go on by.
        minutes: time after which no further cell is started; no limit if None.
        workers: number of sites that train in parallel, as in ``simulate``.
        observer: follows the runs.

    Returns:
        The bench with all its results.

    Raises:
        FlapsamError: the configuration or the data are wrong, or an existing cell was computed with another configuration.
    """
    observer = observer or Observer()
    config = with_threads(config, workers)
    folds = Folds()
    cells = cells_of(config, folds)
    selected = [cell for cell in cells if fnmatchcase(cell.name, only)]
    if not selected:
        raise FlapsamError(f"--only {only}: matches no cell; the first cell is '{next(iter(cells)).name}'")
    first, step = shard
    selected = selected[first::step]
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    waiting = deque(enumerate(selected, start=1))
    elsewhere = 0
    while waiting:
        number, cell = waiting.popleft()
        if cell_file(config, cell).exists():
            elsewhere = 0
            continue
        if time.monotonic() >= end:
            rest = f"run the same command to resume with cell {number} of {len(selected)}"
            observer.say(f"stopped after {minutes:g} minutes; {rest}")
            break
        try:
            with alone(_folder(config, cell) / LOCK, wait=False):
                # Another process may have computed it since.
                if not cell_file(config, cell).exists():
                    observer.say(f"cell {number} of {len(selected)}: {cell.name}")
                    _compute(cell, cells[cell], cell_file(config, cell), folds, workers, observer)
            elsewhere = 0
        except InUseError:
            waiting.append((number, cell))
            elsewhere += 1
            if elsewhere == len(waiting):
                observer.say(f"waiting for {elsewhere} {'cell' if elsewhere == 1 else 'cells'} of other processes")
            if elsewhere >= len(waiting):
                time.sleep(LOOK_SECONDS)
    return read_bench(config, cells)


def read_bench(config: RunConfig, cells: Mapping[Cell, RunConfig] | None = None) -> Bench:
    """Read a bench with the results that exist.

    Args:
        config: the run and its grids.
        cells: the cells from ``cells_of``, if they are known.

    Raises:
        FlapsamError: as for ``cells_of`` and ``read_cell``.
    """
    cells = cells_of(config) if cells is None else cells
    results = {cell: read_cell(path, own) for cell, own in cells.items() if (path := cell_file(config, cell)).exists()}
    return Bench(config.output, config.data.classes, list(cells), results)


def read_cell(path: Path, config: RunConfig) -> CellResult:
    """Read a cell's result.

    Args:
        path: the result's file.
        config: the cell's configuration, which the file must match.

    Raises:
        FlapsamError: the file is damaged, or was made with another configuration.
    """
    try:
        tree = json.loads(path.read_text())
        made_with = tree.pop("configuration")
        cell = Cell(Row(**tree["cell"].pop("row")), **tree.pop("cell"))
        result = CellResult(cell, [CaseScores(**score) for score in tree.pop("scores")], **tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlapsamError(f"{path}: is not a cell's result; remove it to compute the cell again") from error
    if made_with != fingerprint(config):
        raise FlapsamError(f"{path}: was computed with another configuration; choose another output, or remove it")
    return result


def _combinations(grid: Grid, config: RunConfig, folds: Folds) -> Sequence[tuple[Cell, dict[str, Any]]]:
    """The cells of one grid, each with the fields that it changes."""
    combinations = []
    strategies, aggregators = grid.strategies or [config.strategy], grid.aggregators or [config.aggregator]
    seeds = [config.seed] if grid.seeds is None else grid.seeds
    for (variant, fields), strategy, mode, aggregator, seed in product(
        grid.variants.items(), strategies, grid.modes, aggregators, seeds
    ):
        leave_out = grid.leave_one_out and mode == "federated"
        for unseen in [site.name for site in folds.sites(config.data, seed)] if leave_out else [""]:
            row = Row(strategy, mode, aggregator if mode == "federated" else "", variant)
            cell = Cell(row, seed, unseen)
            changes = {
                **fields,
                "strategy": strategy,
                "aggregator": aggregator,
                "modes": ["local", mode] if mode == "ensemble" else [mode],
                "seed": seed,
                "data.unseen": [unseen] if unseen else config.data.unseen,
                "output": str(_folder(config, cell)),
                "bench": [],
            }
            combinations.append((cell, changes))
    return combinations


def _compute(cell: Cell, config: RunConfig, path: Path, folds: Folds, workers: int, observer: Observer) -> None:
    """Run or resume a cell and write its result to ``path``."""
    forget_peak()
    folder = RunFolder(config.output)
    sites = folds.sites(config.data, config.seed)
    results = simulate(config, resume=folder.is_begun, workers=workers, sites=sites, observer=observer)
    cases = [case for site in sites for case in site.of("test")]
    up, down = _exchanged(folder) if cell.row.mode == "ensemble" else _traffic(results)
    nearly = nearly_final(results.events)
    result = CellResult(
        cell=cell,
        scores=[score for score in results.scores[cell.row.mode] if cell.unseen in ("", score.site)],
        subjects={f"{case.site}/{case.name}": case.subject for case in cases if cell.unseen in ("", case.site)},
        parameters=results.parameters,
        bytes_up=up,
        bytes_down=down,
        seconds=round(sum(event.seconds for event in results.events if isinstance(event, RoundClosed)), 1),
        peak_bytes=peak_bytes(),
        bytes_95=nearly.bytes_a_site if nearly else None,
    )
    write_text(path, json.dumps({"configuration": fingerprint(config), **asdict(result)}, indent=1) + "\n")
    for no_longer_needed in (folder.state, folder.predictions):
        shutil.rmtree(no_longer_needed, ignore_errors=True)


def _by_site(results: Sequence[CellResult]) -> dict[str, float | None]:
    """Site → mean Dice of its cases, averaged over the seeds."""
    dices: dict[str, list[float | None]] = {}
    for result in results:
        for site, scores in by_site(result.scores).items():
            dices.setdefault(site, []).append(summarise(scores).mean_dice)
    return {site: mean(values) for site, values in sorted(dices.items())}


def _traffic(results: Results) -> tuple[float, float]:
    """Bytes that a site sends and receives in the whole run, the mean over the sites."""
    if results.traffic is None:
        return 0.0, 0.0
    sites = {event.site for event in results.events if isinstance(event, Fitted)}
    up, down = bytes_sent(results.events, TOGETHER)
    return up / len(sites), down / len(sites)


def _exchanged(folder: RunFolder) -> tuple[float, float]:
    """Bytes that a site sends and receives where each sends its own adapter to all others once."""
    sizes = [size_of(*path.glob("*.safetensors")) for path in folder.adapter(Cohort("local")).iterdir()]
    return sum(sizes) / len(sizes), sum(sizes) * (len(sizes) - 1) / len(sizes)


def _folder(config: RunConfig, cell: Cell) -> Path:
    return config.output / "cells" / _plain(cell.name)


def cell_file(config: RunConfig, cell: Cell) -> Path:
    """The file of a cell's result."""
    return config.output / "cells" / f"{_plain(cell.name)}.json"


def _plain(name: str) -> str:
    """The name with only characters that are safe in file names."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name.replace(", ", "--"))
