"""Finding and reading DICOM series: files in any order, with one slice per file or all slices in one file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import size_of
from flapsam.volumes.dicom_slices import Identity, identify, identify_each, open_series
from flapsam.volumes.read_process import look_apart, read_apart
from flapsam.volumes.series import Series
from flapsam.volumes.volume import Volume

FILE = 2**14
"""Bytes that a file counts for beside its size, because opening it takes time."""
BATCH = 100
"""Number of files that a reading process looks at in one go."""


def find_series(folder: Path, files: Sequence[Path]) -> list[Series]:
    """Group the files of a folder into image series. Other objects, such as reports, are left out.

    A file that cannot be read is taken as a slice of the series if there is exactly one, and as a series of its own
    otherwise. ``read_series`` reports what is wrong with it.
    """
    slice_files: dict[tuple[str, str, str], list[Path]] = {}
    whole_files: list[Series] = []
    unreadable: list[Path] = []
    for file, identity in _identities(files):
        if identity is None:
            continue
        if isinstance(identity, str):
            unreadable.append(file)
            continue
        uid, number, description, frames = identity
        if not uid:
            unreadable.append(file)
        elif frames > 1:
            whole_files.append(Series(folder, (file,), uid, number, description, whole_file=True))
        else:
            slice_files.setdefault((uid, number, description), []).append(file)
    if len(slice_files) == 1:
        next(iter(slice_files.values())).extend(unreadable)
    else:
        whole_files += [Series(folder, (file,), whole_file=True) for file in unreadable]
    sliced = [Series(folder, tuple(sorted(members)), *identity) for identity, members in slice_files.items()]
    return sorted(sliced, key=lambda series: (series.number.zfill(8), series.uid)) + whole_files


def _identities(files: Sequence[Path]) -> Iterator[tuple[Path, Identity | str | None]]:
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

    Raises:
        FlapsamError: a file is damaged, has no pixel data or no position in space, or holds colours. Or slices are
            missing, unevenly spaced or twice at the same position, or differ in size or direction.
    """
    return read_apart(open_series, series, _size(series.files))
