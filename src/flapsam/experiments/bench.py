"""Many runs, one table: strategies × modes × aggregators × seeds, each combination a cell.

A cell is a simulation of its own in ``cells/NAME``; once it is over, ``cells/NAME.json`` holds what it gave and the run's
state is removed. So a bench goes on where it was stopped, cell by cell and inside a cell, and cells may be computed on
several machines and put together.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from flapsam.base.environment import forget_peak, peak_bytes
from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.experiments.paired import Difference, compare
from flapsam.experiments.simulation import Results, simulate
from flapsam.federation.preparation import resolve
from flapsam.learning.metrics import CaseScores, by_site, mean, summarise
from flapsam.run.config import Data, Grid, RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, Fitted, RoundClosed, bytes_sent
from flapsam.run.observer import Observer
from flapsam.run.reading import changed, fingerprint
from flapsam.sites import CaseList, Site, list_cases, read_sites


@dataclass(frozen=True)
class Row:
    """What cells of different seeds and unseen sites have in common."""

    strategy: str
    mode: str
    aggregator: str
    variant: str = ""

    @property
    def name(self) -> str:
        """For people and for files."""
        return ", ".join(part for part in (self.strategy, self.variant, self.mode, self.aggregator) if part)


@dataclass(frozen=True)
class Cell:
    """One run of a bench."""

    row: Row
    seed: int
    unseen: str = ""
    """The site that never trains and alone is tested on."""

    @property
    def name(self) -> str:
        """Says which one it is."""
        return f"{self.row.name}, seed {self.seed}" + (f", without {self.unseen}" if self.unseen else "")


@dataclass(frozen=True)
class CellResult:
    """What a cell gave."""

    cell: Cell
    scores: list[CaseScores]
    subjects: dict[str, str]
    """Case, with its site before a slash → subject."""
    parameters: int
    """That train, and travel where anything does."""
    bytes_up: float
    """By a site, over all rounds; 0 where nothing travels."""
    bytes_down: float
    seconds: float
    """Of fitting and aggregating, all sites one after another."""
    peak_bytes: int | None
    """The process's largest memory during the cell, where the system says it."""


@dataclass(frozen=True)
class RowSummary:
    """A line of the table: a row's cells together."""

    row: Row
    planned: int
    """Seeds."""
    done: int
    """Seeds that are there; without any, all else is empty."""
    dice: dict[str, float | None]
    """Class → mean over the cases, and over the seeds."""
    mean_dice: float | None
    hd95: dict[str, float | None]
    sites: dict[str, float | None]
    """Site → mean Dice of its cases."""
    unseen: dict[str, float | None]
    """Site → mean Dice of its cases where it never trained."""
    unseen_dice: float | None
    """Over the cases of all sites, each from the run without its site; None until every site was left out."""
    gain: Difference | None
    """Of the federation over each site alone with the same strategy: the paper's collaborative gain."""
    difference: Difference | None
    """To the first row."""
    parameters: int | None
    bytes_up: float | None
    bytes_down: float | None
    seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Bench:
    """Planned cells and those that are there."""

    folder: Path
    classes: list[str]
    cells: list[Cell]
    results: dict[Cell, CellResult]

    @cached_property
    def rows(self) -> list[RowSummary]:
        """The table, in the order of the grids."""
        rows = list(dict.fromkeys(cell.row for cell in self.cells))
        return [self._summary(row, rows[0]) for row in rows]

    def _summary(self, row: Row, first: Row) -> RowSummary:
        planned = [cell for cell in self.cells if cell.row == row]
        seen = [self.results[cell] for cell in planned if not cell.unseen and cell in self.results]
        unseen = [self.results[cell] for cell in planned if cell.unseen and cell in self.results]
        whole = len(unseen) == sum(bool(cell.unseen) for cell in planned)
        summaries = [summarise(result.scores) for result in seen]
        classes = list(summaries[0].dice) if summaries else []
        alone = Row(row.strategy, "local", "", row.variant)
        return RowSummary(
            row=row,
            planned=sum(not cell.unseen for cell in planned),
            done=len(seen),
            dice={name: mean(summary.dice[name] for summary in summaries) for name in classes},
            mean_dice=mean(summary.mean_dice for summary in summaries),
            hd95={name: mean(summary.hd95[name] for summary in summaries) for name in classes},
            sites=_by_site(seen),
            unseen=_by_site(unseen),
            unseen_dice=summarise([score for result in unseen for score in result.scores]).mean_dice if whole else None,
            gain=self._difference(row, alone) if row.mode == "federated" else None,
            difference=self._difference(row, first) if row != first else None,
            parameters=seen[0].parameters if seen else None,
            bytes_up=mean(result.bytes_up for result in seen),
            bytes_down=mean(result.bytes_down for result in seen),
            seconds=mean(result.seconds for result in seen),
            peak_bytes=max((result.peak_bytes for result in seen if result.peak_bytes), default=None),
        )

    def _difference(self, first: Row, second: Row) -> Difference | None:
        """Paired by seed and case."""
        scores: dict[Row, dict[str, float]] = {first: {}, second: {}}
        subjects = {}
        for cell, result in self.results.items():
            if cell.row not in scores or cell.unseen:
                continue
            for score in result.scores:
                value = mean(score.dice.values())
                if value is not None:
                    place = f"{score.site}/{score.case}"
                    scores[cell.row][f"{cell.seed} {place}"] = value
                    subjects[f"{cell.seed} {place}"] = f"{score.site}/{result.subjects[place]}"
        return compare(scores[first], scores[second], subjects)


def front(rows: Sequence[RowSummary]) -> list[RowSummary]:
    """The Pareto front: rows that travel, to which no other has both fewer parameters and a higher Dice; cheapest first."""
    best, found = -1.0, []
    for row in sorted(measured(rows), key=lambda row: (row.parameters, -(row.mean_dice or 0))):
        if row.mean_dice is not None and row.mean_dice > best:
            best = row.mean_dice
            found.append(row)
    return found


@dataclass(frozen=True)
class Suggestion:
    """What a bench recommends."""

    cheapest: RowSummary
    """The row with the fewest parameters whose Dice is close to the best."""
    best: RowSummary
    missing: list[str]
    """Names of federated rows that are not complete and may change this."""


def suggest(rows: Sequence[RowSummary], tolerance: float) -> Suggestion:
    """The cheapest row whose Dice is within ``tolerance`` of the best.

    Raises:
        FlapsamError: no federated row has been computed.
    """
    candidates = front(rows)
    if not candidates:
        raise FlapsamError("no federated row has been computed, so there is nothing to suggest; run flapsam bench first")
    best = candidates[-1]
    cheapest = next(row for row in candidates if (row.mean_dice or 0) >= (best.mean_dice or 0) - tolerance)
    missing = [row.row.name for row in rows if row.row.mode == "federated" and row.done < row.planned]
    return Suggestion(cheapest, best, missing)


def measured(rows: Sequence[RowSummary]) -> list[RowSummary]:
    """The federated rows that are there."""
    return [row for row in rows if row.row.mode == "federated" and row.done]


class Folds:
    """The sites of a bench's runs. The data's folder is searched once, however many seeds and variants read it."""

    def __init__(self) -> None:
        self._found: dict[str, CaseList] = {}

    def sites(self, data: Data, seed: int) -> list[Site]:
        """As ``read_sites``.

        Raises:
            FlapsamError: as ``read_sites``.
        """
        key = f"{data.layout} {data.path}"
        if key not in self._found:
            self._found[key] = list_cases(data.path, data.layout)
        return read_sites(data, seed, self._found[key])


def cells_of(config: RunConfig, folds: Folds | None = None) -> dict[Cell, RunConfig]:
    """The cells of a run's grids in their order, each with its own configuration.

    Args:
        config: the run and its grids.
        folds: the sites of each seed, if they have been read before.

    Raises:
        FlapsamError: a name in a grid is unknown, or a variant's field is.
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
    minutes: float | None = None,
    observer: Observer | None = None,
) -> Bench:
    """Compute the cells that are missing.

    Args:
        config: the run and its grids.
        only: a shell-style pattern of the names of the cells to compute.
        minutes: no cell is begun after these.
        observer: follows the runs.

    Raises:
        FlapsamError: the configuration or the data are wrong, or an existing cell was computed with another configuration.
    """
    observer = observer or Observer()
    folds = Folds()
    cells = cells_of(config, folds)
    wanted = [cell for cell in cells if fnmatchcase(cell.name, only)]
    if not wanted:
        raise FlapsamError(f"--only {only}: no cell has such a name; the first is '{next(iter(cells)).name}'")
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    for number, cell in enumerate(wanted, start=1):
        if cell_file(config, cell).exists():
            continue
        if time.monotonic() >= end:
            observer.say(f"{minutes:g} minutes are over; the same command goes on with cell {number} of {len(wanted)}")
            break
        observer.say(f"cell {number} of {len(wanted)}: {cell.name}")
        _compute(cell, cells[cell], cell_file(config, cell), folds, observer)
    return read_bench(config, cells)


def read_bench(config: RunConfig, cells: Mapping[Cell, RunConfig] | None = None) -> Bench:
    """What is there of a bench.

    Args:
        config: the run and its grids.
        cells: the same as ``cells_of`` it, where they are known.

    Raises:
        FlapsamError: as ``cells_of`` and ``read_cell``.
    """
    cells = cells_of(config) if cells is None else cells
    results = {cell: read_cell(path, own) for cell, own in cells.items() if (path := cell_file(config, cell)).exists()}
    return Bench(config.output, config.data.classes, list(cells), results)


def read_cell(path: Path, config: RunConfig) -> CellResult:
    """The result of a cell with this configuration.

    Raises:
        FlapsamError: the file is damaged, or was made with another configuration.
    """
    try:
        tree = json.loads(path.read_text())
        made_with = tree.pop("configuration")
        cell = Cell(Row(**tree["cell"].pop("row")), **tree.pop("cell"))
        result = CellResult(cell, [CaseScores(**score) for score in tree.pop("scores")], **tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlapsamError(f"{path}: not a cell's result; remove it and it is computed again") from error
    if made_with != fingerprint(config):
        raise FlapsamError(f"{path}: it was made with another configuration; choose another output, or remove it")
    return result


def _combinations(grid: Grid, config: RunConfig, folds: Folds) -> Sequence[tuple[Cell, dict[str, Any]]]:
    """The cells of one grid with the fields that they change."""
    found = []
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
                "modes": [mode],
                "seed": seed,
                "data.unseen": [unseen] if unseen else config.data.unseen,
                "output": str(_folder(config, cell)),
                "bench": [],
            }
            found.append((cell, changes))
    return found


def _compute(cell: Cell, config: RunConfig, path: Path, folds: Folds, observer: Observer) -> None:
    """Run a cell, or resume it, and keep its result in ``path``."""
    forget_peak()
    folder = RunFolder(config.output)
    sites = folds.sites(config.data, config.seed)
    results = simulate(config, resume=folder.is_begun, sites=sites, observer=observer)
    cases = [case for site in sites for case in site.of("test")]
    up, down = _traffic(results)
    result = CellResult(
        cell=cell,
        scores=[score for score in results.scores[cell.row.mode] if cell.unseen in ("", score.site)],
        subjects={f"{case.site}/{case.name}": case.subject for case in cases if cell.unseen in ("", case.site)},
        parameters=results.parameters,
        bytes_up=up,
        bytes_down=down,
        seconds=round(sum(event.seconds for event in results.events if isinstance(event, RoundClosed)), 1),
        peak_bytes=peak_bytes(),
    )
    write_text(path, json.dumps({"configuration": fingerprint(config), **asdict(result)}, indent=1) + "\n")
    for needless in (folder.state, folder.predictions):
        shutil.rmtree(needless, ignore_errors=True)


def _by_site(results: Sequence[CellResult]) -> dict[str, float | None]:
    """Mean Dice of each site's cases, and over the seeds."""
    found: dict[str, list[float | None]] = {}
    for result in results:
        for site, scores in by_site(result.scores).items():
            found.setdefault(site, []).append(summarise(scores).mean_dice)
    return {site: mean(values) for site, values in sorted(found.items())}


def _traffic(results: Results) -> tuple[float, float]:
    """Bytes up and down of a site in the whole run, the mean over the sites."""
    if results.traffic is None:
        return 0.0, 0.0
    sites = {event.site for event in results.events if isinstance(event, Fitted)}
    up, down = bytes_sent(results.events, TOGETHER)
    return up / len(sites), down / len(sites)


def _folder(config: RunConfig, cell: Cell) -> Path:
    return config.output / "cells" / _plain(cell.name)


def cell_file(config: RunConfig, cell: Cell) -> Path:
    """Where a cell's result is kept."""
    return config.output / "cells" / f"{_plain(cell.name)}.json"


def _plain(name: str) -> str:
    """A name that may be a file's."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name.replace(", ", "--"))
