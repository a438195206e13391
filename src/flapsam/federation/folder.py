"""A run's folder: which run it is, and what it was asked to do."""

import json
import uuid
from pathlib import Path
from typing import Any

from flapsam.config import RunConfig, read_config, write_config
from flapsam.environment import environment
from flapsam.errors import FlapsamError, too_new
from flapsam.files import check_writable, write_text

DESCRIPTION, IDENTITY, LEDGER = "run.yaml", "environment.json", "events.jsonl"
FORMAT = 1
"""Of the folder: its files, the ledger's events, and the state that a run is resumed from."""
LOCK = "lock"
"""In ``state``: locked by the process that is at work on the run."""


def begin_run(config: RunConfig) -> str:
    """Make the folder ``config.output``; returns the run's id.

    Raises:
        FlapsamError: it cannot be written.
    """
    check_writable(config.output)
    write_text(config.output / DESCRIPTION, write_config(config))
    run = uuid.uuid4().hex
    write_text(config.output / IDENTITY, json.dumps({"format": FORMAT, "run": run, **environment()}, indent=2) + "\n")
    return run


def is_begun(folder: Path) -> bool:
    """Whether there is a run in a folder."""
    return (folder / IDENTITY).exists()


def read_identity(folder: Path) -> dict[str, Any]:
    """Which run is in a folder (``run``), and what it ran on.

    Raises:
        FlapsamError: there is none, it cannot be read, or a later version has written it.
    """
    path = folder / IDENTITY
    try:
        written = json.loads(path.read_text())
        # Folders did not say their format at first; which run they hold, always.
        identity = {"format": 1, **written, "run": written["run"]}
    except FileNotFoundError as error:
        raise FlapsamError(
            f"{folder}: there is no run here; give a folder that flapsam simulate or federation run has written"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FlapsamError(f"{path}: cannot be read, so it is not known which run this is") from error
    if problem := too_new(identity["format"], FORMAT):
        raise FlapsamError(f"{path}: {problem}")
    return identity


def found_run(config: RunConfig) -> str:
    """The id of the run in the folder ``config.output``.

    Raises:
        FlapsamError: it was begun with another configuration, or by a later version.
    """
    identity = read_identity(config.output)
    description = config.output / DESCRIPTION
    # Read, not compared as text: a later version writes fields that an earlier one did not know.
    if write_config(read_config(description)) != write_config(config):
        raise FlapsamError(f"{description}: the run here was started with another configuration; give that one to resume it")
    return identity["run"]
