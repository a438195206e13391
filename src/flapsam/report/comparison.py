"""Several runs on one page: overlaid curves, and a table of paired differences."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flapsam.errors import FlapsamError
from flapsam.files import write_text
from flapsam.report.figures.compared import Runs, configurations, dice_by_class, overlaid, traffic_of_each
from flapsam.report.figures.drawing import chart_style
from flapsam.report.page import cases_of, render, subjects_of
from flapsam.report.run import TITLES, Run, read_run
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, number


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of several runs; the first is the one that the others are compared with.

    Args:
        folders: of the runs.
        output: the page.

    Returns:
        The page.

    Raises:
        FlapsamError: a folder is no run, one is given twice, or no mode is in all of them.
    """
    twice = [folder for folder, count in Counter(one.resolve() for one in folders).items() if count > 1]
    if twice:
        raise FlapsamError(f"{twice[0]}: this run is given twice; give runs that differ")
    runs = _named([read_run(folder) for folder in folders])
    mode = next((mode for mode in TITLES if all(mode in run.modes for run in runs.values())), None)
    if mode is None:
        raise FlapsamError(f"{', '.join(runs)}: they have no mode in common, so there is nothing to compare")
    subjects = {key: subject for run in runs.values() for key, subject in subjects_of(cases_of(run)).items()}
    with chart_style():
        sections = [
            dice_by_class(runs, mode, subjects),
            overlaid(runs, mode, "dice-per-round", "Dice per round", "validation Dice", lambda run: run.validation(mode)),
            overlaid(runs, mode, "losses", "Training loss", "training loss", lambda run: run.fits(mode, "loss")),
            traffic_of_each(runs),
            configurations(runs),
            _folders(runs, mode),
        ]
    page = render(
        title=f"{len(runs)} runs compared",
        kind="Runs of flapsam",
        notes="",
        warning="; ".join(f"{label} is not over" for label, run in runs.items() if not run.finished),
        about=", ".join(runs),
        tiles=[],
        sections=[section for section in sections if section],
    )
    write_text(output, page)
    return output


def _named(runs: Sequence[Run]) -> Runs:
    """Each run under its folder's name, or the whole path where two have the same."""
    names = Counter(run.name for run in runs)
    return {run.name if names[run.name] == 1 else str(run.folder): run for run in runs}


def _folders(runs: Runs, mode: str) -> Section:
    rows = []
    for label, run in runs.items():
        pooled = run.pooled(mode)
        dice = number(pooled.mean_dice) if pooled else NONE
        cells = [label, str(run.folder), run.config.notes or NONE, str(len(run.sites)), str(run.rounds(mode)), dice]
        rows.append(cells)
    head = ["run", "folder", "notes", "sites", "rounds", "test Dice"]
    table = Table("runs-table", "The runs", head, rows, text_columns=3, opened=True)
    return Section("runs", "The runs", "Each has a report of its own in its folder.", tables=[table])
