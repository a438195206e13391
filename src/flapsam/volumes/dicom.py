"""Finding and reading DICOM series: files in any order, with one slice per file or all slices in one file."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from flapsam.base.errors import FlapsamError
from flapsam.base.files import size_of
from flapsam.volumes.dicom_slices import EVEN, Identity, identify, identify_each, open_series
from flapsam.volumes.left_out import LeftOut
from flapsam.volumes.read_process import look_apart, read_apart
from flapsam.volumes.series import Series
from flapsam.volumes.volume import Volume

FILE = 2**14
"""Bytes that a file counts for beside its size, because opening it takes time."""
BATCH = 100
"""Number of files that a reading process looks at in one go."""
SAME = 1e-3
"""Tolerance for the direction cosines of slices of one series."""


@dataclass
class Found:
    """The image series among some files, and the files that are left out."""

    series: list[Series]
    left_out: list[LeftOut] = field(default_factory=list)


def sort_files(files: Sequence[Path]) -> Found:
    """Group files into image series, by the UID of their series.

    The files of one folder with the same UID and number are a series. So are those of several folders if their slices are
    evenly spaced only together. Copies of a file and objects that are not images, such as reports, are left out.

    A file that cannot be read is taken as a slice of the series if its folder has exactly one, and as a series of its own
    otherwise. ``read_series`` reports what is wrong with it.

    Args:
        files: DICOM files, perhaps in several folders.
    """
    found = Found([])
    parts: dict[tuple[Path, str, str], _Part] = {}
    unreadable: list[Path] = []
    for file, identity in _identities(files):
        if isinstance(identity, str):
            unreadable.append(file)
        elif identity["reason"]:
            found.left_out.append(LeftOut(file, identity["reason"]))
        elif identity["uid"] and identity["frames"] > 1:
            uid, number, description = identity["uid"], identity["number"], identity["description"]
            found.series.append(Series(file.parent, (file,), uid, number, description, whole_file=True))
        else:
            key = (file.parent, identity["uid"], identity["number"] if identity["uid"] else "")
            parts.setdefault(key, _Part([])).members.append((file, identity))
    # Files whose series has no UID are taken as slices of the only series that has one.
    for key in [key for key in parts if not key[1]]:
        others = [part for other, part in parts.items() if other[0] == key[0] and other[1]]
        if len(others) == 1:
            others[0].members += parts.pop(key).members
    for part in parts.values():
        found.left_out += part.without_copies()
    sliced = []
    for part in _merged(list(parts.values())):
        found.left_out += part.without_copies()
        sliced.append(part.series())
    alone = []
    for file in unreadable:
        beside = [index for index, series in enumerate(sliced) if any(one.parent == file.parent for one in series.files)]
        if len(beside) == 1:
            series = sliced[beside[0]]
            files_of = tuple(sorted((*series.files, file)))
            sliced[beside[0]] = Series(series.folder, files_of, series.uid, series.number, series.description)
        else:
            alone.append(Series(file.parent, (file,), whole_file=True))
    found.series = sorted(sliced, key=lambda series: (series.number.zfill(8), series.uid)) + found.series + alone
    return found


@dataclass
class _Part:
    """Files that belong together, with what each is."""

    members: list[tuple[Path, Identity]]

    @property
    def uid(self) -> str:
        return self.members[0][1]["uid"]

    @property
    def slices(self) -> set[tuple]:
        """Identifier and position of each slice."""
        return {_slice_of(identity) for _, identity in self.members}

    def without_copies(self) -> list[LeftOut]:
        """Remove files that are the same, byte by byte, as an earlier one with the same slice, and return them."""
        left_out, kept = [], {}
        remaining = []
        for file, identity in sorted(self.members, key=lambda member: (len(member[0].name), member[0])):
            same = [earlier for earlier in kept.setdefault(_slice_of(identity), []) if _are_equal(earlier, file)]
            if same:
                left_out.append(LeftOut(file, "copies of other files of the series"))
            else:
                kept[_slice_of(identity)].append(file)
                remaining.append((file, identity))
        self.members = sorted(remaining, key=lambda member: member[0])
        return left_out

    def is_even(self) -> bool:
        """Whether the slices have one size and direction, and are evenly spaced. Copies of a slice count once."""
        places = [place for _, place in self.slices]
        if not all(places):
            return False
        numbers = np.array(places)
        if not np.allclose(numbers[:, :6], numbers[0, :6], atol=SAME) or (numbers[:, 9:] != numbers[0, 9:]).any():
            return False
        along = np.sort(numbers[:, 6:9] @ np.cross(numbers[0, :3], numbers[0, 3:6]))
        steps = np.diff(along)
        return len(steps) == 0 or bool(steps.min() > 0 and np.ptp(steps) < EVEN * np.median(steps))

    def series(self) -> Series:
        files = tuple(file for file, _ in self.members)
        first = self.members[0][1]
        common = Path(os.path.commonpath([file.parent for file in files]))
        return Series(common, files, first["uid"], first["number"], first["description"])


def _slice_of(identity: Identity) -> tuple:
    return identity["instance"], tuple(identity["place"])


def _are_equal(first: Path, second: Path) -> bool:
    try:
        if first.stat().st_size != second.stat().st_size:
            return False
        digests = []
        for path in (first, second):
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return False
    return digests[0] == digests[1]


def _merged(parts: list[_Part]) -> list[_Part]:
    """The same parts, with those as one that make one volume only together."""
    by_uid: dict[str, list[_Part]] = {}
    for part in parts:
        by_uid.setdefault(part.uid, []).append(part)
    result: list[_Part] = []
    for uid, group in by_uid.items():
        whole = _Part([member for part in group for member in part.members])
        nested = any(one.slices <= other.slices or other.slices <= one.slices for one, other in combinations(group, 2))
        if uid and len(group) > 1 and not nested and whole.is_even():
            result.append(whole)
        else:
            result += group
    return result


def _identities(files: Sequence[Path]) -> Iterator[tuple[Path, Identity | str]]:
    """What ``identify_each`` returns, for many files at once, or for each alone if one of them ends the process."""
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        try:
            yield from zip(batch, look_apart(identify_each, batch, _size(batch)), strict=True)
        except FlapsamError:
            for file in batch:
                try:
                    yield file, look_apart(identify, file, _size([file]))
                except FlapsamError as error:
                    yield file, str(error)


def _size(files: Sequence[Path]) -> int:
    return size_of(*files) + FILE * len(files)


def read_series(series: Series) -> Volume:
    """Read a series, as integers if slope and intercept are whole, else as float32.

    Numbers of MONOCHROME1 images, which show high numbers dark, are turned around, as ITK does.

    Raises:
        FlapsamError: a file is damaged, has no pixel data or no position in space, or holds colours. Or slices are
            missing, unevenly spaced or twice at the same position, or differ in size or direction.
    """
    return read_apart(open_series, series, _size(series.files))
