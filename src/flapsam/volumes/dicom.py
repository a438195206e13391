"""Finding and reading DICOM series: files in any order, with one slice per file or all slices in one file."""

from collections.abc import Sequence
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import size_of
from flapsam.volumes.dicom_slices import identify, open_series
from flapsam.volumes.read_process import look_apart, read_apart
from flapsam.volumes.series import Series
from flapsam.volumes.volume import Volume

FILE = 2**16
"""Bytes that a file counts for beside its size, because opening it takes time."""


def find_series(folder: Path, files: Sequence[Path]) -> list[Series]:
    """Group the files of a folder into image series. Other objects, such as reports, are left out.

    A file that cannot be read is taken as a slice of the series if there is exactly one, and as a series of its own
    otherwise. ``read_series`` reports what is wrong with it.
    """
    slice_files: dict[tuple[str, str, str], list[Path]] = {}
    whole_files: list[Series] = []
    unreadable: list[Path] = []
    for file in files:
        try:
            identity = look_apart(identify, file, size_of(file) + FILE)
        except FlapsamError:
            unreadable.append(file)
            continue
        if identity is None:
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


def read_series(series: Series) -> Volume:
    """Read a series, as integers if slope and intercept are whole, else as float32.

    Raises:
        FlapsamError: a file is damaged, has no pixel data or no position in space, or holds colours. Or slices are
            missing, unevenly spaced or twice at the same position, or differ in size or direction.
    """
    return read_apart(open_series, series, size_of(*series.files) + FILE * len(series.files))
