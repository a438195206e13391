"""A site's journal: what runs asked of it, what it answered, and what it refused. It never leaves the site.

Every entry holds a checksum of itself and of all entries before it. Whoever notes the newest checksum elsewhere can find out
later whether the journal was changed since.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder, read_text

CHAIN = "chain"
"""Field of an entry that holds the checksum."""
START = "0" * 64
"""What stands in the place of a checksum before the first entry."""


@dataclass(frozen=True)
class Verified:
    """A journal whose checksums are right."""

    entries: int
    unchained: int
    """Number of entries at its beginning that an earlier version wrote without checksums."""
    kinds: dict[str, int]
    """Kind of an entry → number."""
    head: str
    """The newest checksum, which stands for the whole journal."""


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
            self.head = START
            for entry in map(json.loads, whole.splitlines()):
                self._count(entry)
                self.head = entry.get(CHAIN) or link(self.head, entry)
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
        # As it will be read, in which tuples are lists and all keys are texts.
        entry = json.loads(json.dumps(entry))
        entry[CHAIN] = head = link(self.head, entry)
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
        self.head = head
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


def link(before: str, entry: Mapping[str, Any]) -> str:
    """SHA-256 of the checksum before an entry and of the entry's other fields."""
    fields = {name: value for name, value in entry.items() if name != CHAIN}
    return hashlib.sha256(f"{before} {json.dumps(fields, sort_keys=True)}".encode()).hexdigest()


def verify(path: Path, noted: str | None = None) -> Verified:
    """Check every checksum of a journal.

    Args:
        path: the file.
        noted: a checksum that was the newest one once. It must still be among the journal's.

    Raises:
        FlapsamError: the file cannot be read, or entries were changed, moved or removed.
    """
    try:
        lines = read_text(path).splitlines()
        entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        kinds = Counter(str(entry["what"]) for entry in entries)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FlapsamError(f"{path}: cannot read this journal; a line in it is damaged, or it is missing") from error
    heads, unchained = [START], 0
    for number, entry in enumerate(entries, start=1):
        heads.append(link(heads[-1], entry))
        if CHAIN not in entry and unchained == number - 1:
            unchained = number
        elif entry.get(CHAIN) != heads[-1]:
            raise FlapsamError(f"{path}: line {number} was changed, or a line before it was changed, moved or removed")
    if noted is not None and noted not in heads[1:]:
        raise FlapsamError(
            f"{path}: no entry has the checksum {noted}; entries were removed from the end, or all of the journal was "
            "written again since it was noted"
        )
    return Verified(len(entries), unchained, dict(kinds), heads[-1])
