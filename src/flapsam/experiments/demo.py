"""The demo: from nothing to scored label maps, with the same commands that users run."""

from collections.abc import Sequence
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.run.reading import read_config

DESCRIPTION = Path(__file__).with_name("demo.yaml")
"""Configuration of the demo's run. Its paths are relative to the demo's folder."""
RUN = "run.yaml"


def begin_demo(folder: Path, assignments: Sequence[str]) -> None:
    """Write the run's configuration into a new folder.

    Args:
        folder: the demo's folder, which must be new or empty.
        assignments: changes to the run's fields, such as ``rounds.count=2``. They are only checked here.

    Raises:
        FlapsamError: the folder is not empty, it cannot be written, or an assignment is wrong.
    """
    read_config(DESCRIPTION, assignments)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FlapsamError(f"{folder}: already exists; name another folder for the demo, or remove this one")
    write_text(folder / RUN, DESCRIPTION.read_text(encoding="utf-8"))


def demo_commands(folder: Path, *, sites: int, cases: int, assignments: Sequence[str]) -> list[list[str]]:
    """The arguments of the demo's ``flapsam`` commands, in order.

    Args:
        folder: the folder that ``begin_demo`` has prepared.
        sites: number of synthetic sites.
        cases: number of cases at each site.
        assignments: the same as for ``begin_demo``.
    """
    data, run, label_maps = (str(folder / name) for name in ("sites", "run", "label_maps"))
    changes = [part for assignment in assignments for part in ("--set", assignment)]
    return [
        ["data", "phantom", data, "--sites", str(sites), "--cases", str(cases)],
        ["simulate", str(folder / RUN), *changes],
        ["predict", run, data, "--split", "test", "--output", label_maps],
        ["evaluate", label_maps, data, "--adapter", run],
    ]
