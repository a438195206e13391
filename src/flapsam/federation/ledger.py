"""``events.jsonl``: what happened in a run, one JSON object a line, written as it happens."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flapsam.errors import FlapsamError
from flapsam.metrics import CaseScores

Event = dict[str, Any]
TOGETHER = "federated"
"""Name of the federation of all sites; one that trains alone is ``local/SITE``, the pooled data ``centralised``."""
IDENTITY = ("event", "federation", "round", "site", "case")
"""Fields that say which event it is; a resumed run does not write the same event twice."""
REPEATED = ("refused", "missing", "excluded", "job", "job_end", "label_map")
"""Events that are each their own."""


class Ledger:
    """Appends events to a file."""

    def __init__(self, path: Path, told: Callable[[Event], object] = lambda _: None) -> None:
        """Open a ledger; a last line that a crash cut short is removed.

        Args:
            path: of its file.
            told: is given every event that is written.

        Raises:
            FlapsamError: the file cannot be read or written.
        """
        self.path = path
        self.told = told
        try:
            if path.exists():
                whole = path.read_bytes()
                os.truncate(path, whole.rfind(b"\n") + 1)
            self.known = {_identity(event) for event in read_ledger(path)} if path.exists() else set()
            path.touch()
        except OSError as error:
            raise FlapsamError(f"{path}: the ledger cannot be written ({error.strerror})") from error

    def holds(self, event: str, **identity: Any) -> bool:
        """Whether an event stands there already."""
        return _identity({"event": event, **identity}) in self.known

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with the time, unless it stands there already."""
        entry = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        if event in REPEATED or _identity(entry) not in self.known:
            before = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError:
                # A full disk may take a part of the line; the next one must not be appended to that.
                os.truncate(self.path, before)
                raise
            self.known.add(_identity(entry))
            self.told(entry)


def read_ledger(path: Path, *, whole_lines: bool = False) -> list[Event]:
    """All events of a ledger.

    Args:
        path: of its file.
        whole_lines: leave out a last line that is not whole, because another process is writing it.

    Raises:
        FlapsamError: it is missing or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in (text[: text.rfind("\n") + 1] if whole_lines else text).splitlines()]
    except OSError as error:
        raise FlapsamError(f"{path}: there is no ledger here; is this the folder of a run?") from error
    except ValueError as error:
        raise FlapsamError(f"{path}: the ledger is damaged") from error


def scores_in(event: Event) -> CaseScores:
    """What a ``test`` event says of its case."""
    return CaseScores(event["case"], event["site"], event["dice"], event["hd95"])


def _identity(event: Event) -> tuple[Any, ...]:
    return tuple(event.get(field) for field in IDENTITY)
