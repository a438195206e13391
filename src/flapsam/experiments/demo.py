"""The demo: from nothing to scored label maps, with the commands that anyone would give."""

from collections.abc import Sequence
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.run.reading import read_config

DESCRIPTION = Path(__file__).with_name("demo.yaml")
"""Of the demo's run; its paths are relative to the demo's folder."""
RUN = "run.yaml"


def begin_demo(folder: Path, assignments: Sequence[str]) -> None:
    """Put the run's description into a new folder.

    Args:
        folder: where to.
        assignments: changed fields of the run, such as ``rounds.count=2``; only looked at.

    Raises:
        FlapsamError: there is something in the folder, it cannot be written, or an assignment is wrong.
    """
    read_config(DESCRIPTION, assignments)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FlapsamError(f"{folder}: is there already; name another folder for the demo, or remove this one")
    write_text(folder / RUN, DESCRIPTION.read_text(encoding="utf-8"))


def demo_commands(folder: Path, *, sites: int, cases: int, assignments: Sequence[str]) -> list[list[str]]:
    """What to give ``flapsam``, one after the other.

    Args:
        folder: where ``begin_demo`` was.
        sites: number of made-up sites.
        cases: number of cases at each.
        assignments: as ``begin_demo`` was given them.
    """
    data, run, label_maps = (str(folder / name) for name in ("sites", "run", "label_maps"))
    changes = [part for assignment in assignments for part in ("--set", assignment)]
    return [
        ["data", "phantom", data, "--sites", str(sites), "--cases", str(cases)],
        ["simulate", str(folder / RUN), *changes],
        ["predict", run, data, "--split", "test", "--output", label_maps],
        ["evaluate", label_maps, data, "--adapter", run],
    ]
