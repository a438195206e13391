"""``flapsam status``: where a run stands while another process runs it, perhaps on another machine."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from flapsam.base.escaping import one_line
from flapsam.base.files import is_locked
from flapsam.report.standing import Standing
from flapsam.report.standing_view import activity_line, event_line, standing_view, trouble_lines
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import Event, LedgerReader, now

LOOK_SECONDS = 1.0
"""Seconds between two reads of the ledger."""


@dataclass
class Status:
    """State of a run, read from its folder."""

    folder: Path
    run: str
    """The run's id."""
    standing: Standing
    locked: bool
    """Whether a process is known to be running it."""


def read_status(folder: Path) -> Status:
    """Read where a run stands.

    Args:
        folder: the run's folder.

    Raises:
        FlapsamError: there is no run, or its files are damaged.
    """
    return _Follower(folder).status()


def as_json_of(status: Status) -> dict[str, Any]:
    """The status as JSON, for other programs."""
    identity = {"folder": str(status.folder), "run": status.run, "at_work": status.locked}
    return identity | status.standing.as_json(now())


def show(folder: Path, console: Console) -> None:
    """Print where a run stands."""
    console.print(_view(read_status(folder)), soft_wrap=True)


def watch(folder: Path, console: Console) -> None:
    """Show where a run stands until it ends, or print one line per round if the console is not a terminal."""
    follower = _Follower(folder)
    if console.is_terminal:
        with Live(_view(follower.status()), console=console, auto_refresh=False) as live:
            while not follower.standing.ended:
                time.sleep(LOOK_SECONDS)
                deque(follower.look(), maxlen=0)
                live.update(_view(follower.status()), refresh=True)
        return

    def say(text: str) -> None:
        console.print(one_line(text), highlight=False, markup=False, soft_wrap=True)

    def say_activity() -> None:
        say(activity_line(follower.standing, now(), follower.status().locked))

    say_activity()
    for line in trouble_lines(follower.standing):
        say(line)
    while not follower.standing.ended:
        time.sleep(LOOK_SECONDS)
        for event in follower.look():
            if line := event_line(event, follower.standing.under_way):
                say(line)
    say_activity()


class _Follower:
    """Where a run stands, brought up to date by what its ledger has gained."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        self.run: str = self.folder.read_environment()["run"]
        self._read_all()

    def _read_all(self) -> None:
        self.ledger = LedgerReader(self.folder.ledger)
        self.standing = Standing(self.folder.read_config(), self.ledger.added() or [])

    def look(self) -> Iterator[Event]:
        """Yield the events since the last look, each once ``standing`` includes it. None of a run that has gone back."""
        added = self.ledger.added()
        if added is None:
            self._read_all()
        for event in added or ():
            self.standing.add(event)
            yield event

    def status(self) -> Status:
        return Status(self.folder.path, self.run, self.standing, is_locked(self.folder.lock))


def _view(status: Status) -> RenderableType:
    return standing_view(status.standing, f"{status.folder}: run {status.run[:12]}", now(), status.locked)
