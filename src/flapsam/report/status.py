"""``flapsam status``: where a run stands while another process runs it, perhaps on another machine."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from flapsam.base.escaping import one_line
from flapsam.base.files import is_locked
from flapsam.report.run import read_run
from flapsam.report.standing import Standing
from flapsam.report.standing_view import activity_line, event_line, standing_view, trouble_lines
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import now

LOOK_SECONDS = 1.0
"""Seconds between two reads of the ledger."""


@dataclass
class Status:
    """State of a run, read from its folder."""

    folder: Path
    run: str
    """The run's id."""
    standing: Standing
    seen: int
    """Number of the ledger's events that ``standing`` includes."""
    locked: bool
    """Whether a process is known to be running it."""


def read_status(folder: Path) -> Status:
    """Read where a run stands.

    Args:
        folder: the run's folder.

    Raises:
        FlapsamError: there is no run, or its files are damaged.
    """
    run = read_run(folder)
    standing = Standing(run.config, run.events)
    return Status(folder, run.environment["run"], standing, len(run.events), is_locked(RunFolder(folder).lock))


def as_json_of(status: Status) -> dict[str, Any]:
    """The status as JSON, for other programs."""
    identity = {"folder": str(status.folder), "run": status.run, "at_work": status.locked}
    return identity | status.standing.as_json(now())


def show(folder: Path, console: Console) -> None:
    """Print where a run stands."""
    console.print(_view(read_status(folder)), soft_wrap=True)


def watch(folder: Path, console: Console) -> None:
    """Show where a run stands until it ends, or print one line per round if the console is not a terminal."""
    status = read_status(folder)
    if console.is_terminal:
        with Live(_view(status), console=console, auto_refresh=False) as live:
            while not status.standing.ended:
                time.sleep(LOOK_SECONDS)
                status = read_status(folder)
                live.update(_view(status), refresh=True)
        return

    def say(text: str) -> None:
        console.print(one_line(text), highlight=False, markup=False, soft_wrap=True)

    for line in [activity_line(status.standing, now(), status.locked), *trouble_lines(status.standing)]:
        say(line)
    seen = status.seen
    while not status.standing.ended:
        time.sleep(LOOK_SECONDS)
        events = read_run(folder).events
        for event in events[seen:]:
            status.standing.add(event)
            if line := event_line(event, status.standing.under_way):
                say(line)
        seen = len(events)
    say(activity_line(status.standing, now(), status.locked))


def _view(status: Status) -> RenderableType:
    return standing_view(status.standing, f"{status.folder}: run {status.run[:12]}", now(), status.locked)
