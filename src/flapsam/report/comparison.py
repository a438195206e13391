"""The comparison of several runs on one page: overlaid curves, and a table of paired differences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.report.cases import cases_of, subjects_of
from flapsam.report.figures.compared import (
    DICE,
    LOSS,
    SiteTraffic,
    configurations,
    dice_by_class,
    overlaid,
    traffic_of_each,
)
from flapsam.report.figures.drawing import chart_style
from flapsam.report.page import render, write_report
from flapsam.report.run import TITLES, Run, read_run
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, number
from flapsam.run.observer import Observer

COMPARISON = Path("comparison.html")
"""Default file of a comparison of several runs."""


def write_reports(folders: Sequence[Path], output: Path | None, *, images: bool, observer: Observer) -> Path:
    """Write the report of one run, or the comparison of several.

    Args:
        folders: the runs' folders.
        output: the page's path. If None, ``report/index.html`` in the run's folder, or ``comparison.html`` for several.
        images: whether a run's report shows slices of patients.
        observer: follows the work.

    Returns:
        The page's path.

    Raises:
        FlapsamError: as for ``write_report`` and ``write_comparison``.
    """
    if len(folders) == 1:
        return write_report(folders[0], output, images=images, observer=observer)
    return write_comparison(folders, output or COMPARISON)


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write the comparison of several runs, with the first as the reference.

    Args:
        folders: the runs' folders.
        output: the page's path.

    Returns:
        The page's path.

    Raises:
        FlapsamError: a folder holds no run, a run is listed twice, or the runs have no mode in common.
    """
    twice = [folder for folder, count in Counter(path.resolve() for path in folders).items() if count > 1]
    if twice:
        raise FlapsamError(f"{twice[0]}: is listed twice; list each run once")
    runs = _named([read_run(folder) for folder in folders])
    mode = next((mode for mode in TITLES if all(mode in run.modes for run in runs.values())), None)
    if mode is None:
        raise FlapsamError(f"{', '.join(runs)}: have no mode in common; compare runs that share a mode")
    subjects = {key: subject for run in runs.values() for key, subject in subjects_of(cases_of(run)).items()}
    with chart_style():
        sections = [
            dice_by_class({label: run.scores.get(mode, []) for label, run in runs.items()}, mode, subjects),
            overlaid({label: run.validation(mode) for label, run in runs.items()}, mode, DICE),
            overlaid({label: run.fits(mode, lambda fit: fit.loss) for label, run in runs.items()}, mode, LOSS),
            traffic_of_each({label: _site_traffic(run) for label, run in runs.items()}),
            configurations({label: run.config for label, run in runs.items()}),
            _folders(runs, mode),
        ]
    page = render(
        title=f"{len(runs)} runs compared",
        kind="flapsam comparison",
        notes="",
        warning="; ".join(f"{label} is not finished" for label, run in runs.items() if not run.finished),
        about=", ".join(runs),
        tiles=[],
        sections=[section for section in sections if section],
    )
    write_text(output, page)
    return output


def _site_traffic(run: Run) -> SiteTraffic | None:
    sites = len(run.bytes_up)
    return SiteTraffic(run.rounds("federated"), run.travelled / sites) if sites else None


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Label → run. The label is the folder's name, or the whole path if two folders have the same name."""
    names = Counter(run.name for run in runs)
    return {run.name if names[run.name] == 1 else str(run.folder.path): run for run in runs}


def _folders(runs: Mapping[str, Run], mode: str) -> Section:
    rows = []
    for label, run in runs.items():
        pooled = run.pooled(mode)
        dice = number(pooled.mean_dice) if pooled else NONE
        cells = [label, str(run.folder.path), run.config.notes or NONE, str(len(run.sites)), str(run.rounds(mode)), dice]
        rows.append(cells)
    head = ["run", "folder", "notes", "sites", "rounds", "test Dice"]
    table = Table("runs-table", "The runs", head, rows, text_columns=3, opened=True)
    return Section(
        "runs", "The runs", "Each finished run has its own report, report/index.html in its folder.", tables=[table]
    )
