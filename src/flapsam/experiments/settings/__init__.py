"""Settings that ship with flapsam, one YAML file each, for ``flapsam bench NAME --data FOLDER``."""

import json
from collections.abc import Iterable
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config

SETTINGS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""Name of the settings → their file."""


def read_settings(name: str, data: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from settings that ship with flapsam, or from a file.

    Args:
        name: the name of settings, or a path.
        data: the data's folder, in place of ``data.path``.
        overrides: changes to fields, as for ``read_config``.

    Raises:
        FlapsamError: as for ``read_config``, the name is unknown, or settings that ship are read without a data folder.
    """
    path = Path(name)
    given = [f"data.path={json.dumps(str(data))}"] if data else []
    if name in SETTINGS and not path.is_file():
        if not data:
            raise FlapsamError(f"{name}: these settings need data; add --data FOLDER")
        path = SETTINGS[name]
        given.append(f"output=runs/{name}")
    elif not path.suffix and not path.exists():
        raise FlapsamError(
            f"{name}: is neither a file nor settings that ship with flapsam; choose from {', '.join(SETTINGS)}"
        )
    return read_config(path, [*given, *overrides])
