"""A site's journal: what runs asked of it, what it answered, and what it refused. It never leaves the site."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder


class Journal:
    """A file with an entry a line, as JSON. Entries are only ever added."""

    def __init__(self, path: Path) -> None:
        """Open the journal, and read what has left before.

        Args:
            path: the file. It need not exist.

        Raises:
            FlapsamError: the file is damaged or cannot be read.
        """
        self.path = path
        self.fits: set[tuple[str, str]] = set()
        """The answers to fits that have left the site: run, and checksum of the answer."""
        self.scores: dict[tuple[str, int, str], Any] = {}
        """Validation scores that have left the site, by run, round and checksum of the tensors."""
        self.tests: dict[tuple[str, int, str], Any] = {}
        """Test scores that have left the site, by run, round and checksum of the tensors."""
        self.private = False
        """Whether the site has taken part in a private run, so that there must be a ledger of what it spent."""
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                # A crash has cut off the last entry. What it was about had not left the site.
                os.truncate(path, len(whole))
            for entry in map(json.loads, whole.splitlines()):
                self._count(entry)
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise FlapsamError(
                f"{path}: cannot read this journal; move it elsewhere, then max_rounds and max_tests start at 0. Keep "
                "privacy.jsonl"
            ) from error

    def write(self, what: str, run: str, **fields: Any) -> None:
        """Add an entry, and wait until it is on the disk.

        Args:
            what: kind of the entry: ``asked``, ``refused``, ``joined``, ``private``, ``fit``, ``validated`` or ``tested``.
            run: the run's id.
            fields: what else the entry says.

        Raises:
            FlapsamError: the entry cannot be written.
        """
        entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "run": run, **fields}
        make_folder(self.path.parent)
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                try:
                    file.write(json.dumps(entry).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    # A part of a line would make the file unreadable.
                    os.truncate(self.path, size)
                    raise
        except OSError as error:
            raise FlapsamError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self._count(entry)

    def _count(self, entry: Mapping[str, Any]) -> None:
        if entry["what"] == "fit":
            self.fits.add((entry["run"], entry["answer"]))
        elif entry["what"] == "private":
            self.private = True
        elif entry["what"] == "validated":
            self.scores[entry["run"], entry["round"], entry["tensors"]] = entry["left"]
        elif entry["what"] == "tested":
            self.tests[entry["run"], entry["round"], entry["tensors"]] = entry["left"]
