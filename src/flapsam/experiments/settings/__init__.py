"""Runs that ship with flapsam, a YAML file each: ``flapsam bench NAME --data FOLDER``."""

import json
from collections.abc import Iterable
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config

SETTINGS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""Name → file."""


def read_settings(name: str, data: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """A run by the name of settings that ship, or from a file.

    Args:
        name: of the settings, or a path.
        data: the data's folder, in the place of ``data.path``.
        overrides: as ``read_config`` takes them.

    Raises:
        FlapsamError: as ``read_config``; or settings that ship without the data's folder.
    """
    path = Path(name)
    given = [f"data.path={json.dumps(str(data))}"] if data else []
    if name in SETTINGS and not path.is_file():
        if not data:
            raise FlapsamError(f"{name}: say where the data are with --data FOLDER")
        path = SETTINGS[name]
        given.append(f"output=runs/{name}")
    elif not path.suffix and not path.exists():
        raise FlapsamError(f"{name}: neither a file nor settings that ship with flapsam ({', '.join(SETTINGS)})")
    return read_config(path, [*given, *overrides])
