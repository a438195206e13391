"""A run's folder: which run it is, and what it was asked to do."""

import json
import uuid
from pathlib import Path

from flapsam.config import RunConfig, read_config, write_config
from flapsam.environment import environment
from flapsam.errors import FlapsamError
from flapsam.files import check_writable, write_text

DESCRIPTION, IDENTITY, LEDGER = "run.yaml", "environment.json", "events.jsonl"
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
    write_text(config.output / IDENTITY, json.dumps({"run": run, **environment()}, indent=2) + "\n")
    return run


def is_begun(folder: Path) -> bool:
    """Whether there is a run in a folder."""
    return (folder / IDENTITY).exists()


def found_run(config: RunConfig) -> str:
    """The id of the run in the folder ``config.output``.

    Raises:
        FlapsamError: it was begun with another configuration.
    """
    description = config.output / DESCRIPTION
    # Read, not compared as text: a later version writes fields that an earlier one did not know.
    if write_config(read_config(description)) != write_config(config):
        raise FlapsamError(f"{description}: the run here was started with another configuration; give that one to resume it")
    return json.loads((config.output / IDENTITY).read_text())["run"]
