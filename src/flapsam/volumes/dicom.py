"""Reading DICOM series: files in any order, compressed or not, with one slice per file or all slices in one file.

Positions and directions are those of the patient (PS3.3 C.7.6.2 and C.7.6.16.2). The distance between slices comes from
their positions, not from their thickness.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import UID

from flapsam.base.errors import FlapsamError
from flapsam.volumes.allocation import check_claim, room
from flapsam.volumes.itk import LPS
from flapsam.volumes.volume import Volume, check_affine, check_finite

SUFFIXES = (".dcm", ".dicom", ".ima")
EVEN = 0.02
"""Tolerance for the distance between slices, as a share of the median distance."""
ASIDE = 0.2
"""Tolerance for a slice beside the line from the first to the last slice, as a share of the smaller pixel spacing."""
ANGLE = 1e-3
"""Tolerance for the direction cosines of a series."""
IDENTITY = ("SeriesInstanceUID", "SeriesNumber", "SeriesDescription")
BROKEN = (
    *(InvalidDicomError, OSError, EOFError, AttributeError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
"""Exceptions that pydicom and its decoders raise for damaged files."""


@dataclass(frozen=True)
class Series:
    """A DICOM series: files of one folder that hold a slice each, or one file with all slices."""

    folder: Path
    files: tuple[Path, ...]
    uid: str = ""
    number: str = ""
    description: str = ""
    whole_file: bool = False
    """Whether the series is one file with all slices, or one that cannot be read, rather than a file per slice."""

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.folder)

    @property
    def title(self) -> str:
        """Number, description and number of files of the series, for people."""
        parts = (self.number, f"'{self.description}'" if self.description else "", f"({len(self.files)} files)")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Plane:
    """Position of a slice, and the meaning of its stored numbers."""

    file: Path
    frame: int
    rows: int
    columns: int
    corner: NDArray[np.float64]
    """Centre of the first voxel in mm, in LPS+ (left, back, head)."""
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    spacing: tuple[float, float]
    """Distance in mm between rows, and between columns."""
    slope: float
    intercept: float
    range: tuple[int, int]
    """Lowest and highest number that can be stored."""
    thickness: float


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its name or its first bytes. Hidden files and DICOMDIR do not count."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return False
    if path.name.lower().endswith(SUFFIXES):
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


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
            header = pydicom.dcmread(
                file, stop_before_pixels=True, specific_tags=["SOPClassUID", "NumberOfFrames", *IDENTITY]
            )
            kind = UID(str(header.get("SOPClassUID", "")))
            uid, number, description = (str(header.get(field) or "") for field in IDENTITY)
            frames = int(header.get("NumberOfFrames") or 1)
        except BROKEN:
            unreadable.append(file)
            continue
        if kind and "Image Storage" not in kind.name:
            continue
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
    planes = sorted_planes(series)
    first = planes[0]
    affine = _affine(series, planes)
    low, high = (extreme(extreme(p.slope * v + p.intercept for v in p.range) for p in planes) for extreme in (min, max))
    whole = all(p.slope.is_integer() and p.intercept.is_integer() for p in planes)
    kinds = [kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]
    shape = (first.columns, first.rows, len(planes))
    array = room(first.file, shape, kinds[0] if whole and kinds else np.float32)
    for index, (plane, pixels) in enumerate(zip(planes, _pixels(planes), strict=True)):
        if pixels.shape != (plane.rows, plane.columns):
            raise FlapsamError(
                f"{plane.file}: its pixel data have shape {pixels.shape}, but its header says "
                f"{(plane.rows, plane.columns)}; export it again"
            )
        scaled = pixels if (plane.slope, plane.intercept) == (1, 0) else pixels * plane.slope + plane.intercept
        array[:, :, index] = scaled.T
    check_finite(array, series.folder)
    return Volume(array, affine)


def sorted_planes(series: Series) -> list[Plane]:
    """The slices of a series in the order of their positions, after checking them against each other.

    Raises:
        FlapsamError: as ``read_series``.
    """
    planes = [plane for file in series.files for plane in _planes(file)]
    first = planes[0]
    for plane in planes:
        if (plane.rows, plane.columns) != (first.rows, first.columns) or not np.allclose(plane.spacing, first.spacing, 1e-3):
            raise FlapsamError(
                f"{plane.file}: its slice differs in size or spacing from {first.file.name}; separate the volumes"
            )
        if not np.allclose([plane.along_row, plane.along_column], [first.along_row, first.along_column], atol=ANGLE):
            raise FlapsamError(
                f"{plane.file}: its slice differs in orientation from {first.file.name}; separate the volumes"
            )
    normal = np.cross(first.along_row, first.along_column)
    planes.sort(key=lambda plane: float(plane.corner @ normal))
    _check_distances(series, planes, normal)
    return planes


def _check_distances(series: Series, planes: Sequence[Plane], normal: NDArray[np.float64]) -> None:
    if len(planes) < 2:
        return
    steps = np.diff([plane.corner @ normal for plane in planes])
    usual = float(np.median(steps))
    doubled = int((steps < EVEN * max(usual, 1e-3)).sum())
    if doubled:
        raise FlapsamError(
            f"{series}: {doubled} slices have the same position as another, so the series holds several volumes, such as "
            "time points; separate the volumes"
        )
    odd = np.flatnonzero(abs(steps - usual) > EVEN * usual)
    if not len(odd):
        line = np.linspace(planes[0].corner, planes[-1].corner, len(planes))
        aside = np.linalg.norm([plane.corner for plane in planes] - line, axis=1)
        if aside.max() > ASIDE * min(planes[0].spacing):
            raise FlapsamError(f"{planes[int(aside.argmax())].file}: its slice is shifted sideways; resample the series")
        return
    where = planes[int(odd[0])].file.name
    times = steps[odd] / usual
    if (abs(times - np.rint(times)) < EVEN * times).all() and (times > 1.5).all():
        missing = int(np.rint(times).sum()) - len(odd)
        what = "1 slice is missing" if missing == 1 else f"{missing} slices are missing, the first"
        raise FlapsamError(f"{series}: {what} after {where}; export the series again")
    raise FlapsamError(
        f"{series}: its slices are unevenly spaced, {steps.min():.4g} to {steps.max():.4g} mm apart, first after {where}; "
        "resample the series to an even spacing"
    )


def _affine(series: Series, planes: Sequence[Plane]) -> NDArray[np.float64]:
    first, last = planes[0], planes[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing[1]
    affine[:3, 1] = first.along_column * first.spacing[0]
    if len(planes) > 1:
        # With a tilted gantry, this differs from the slices' normal.
        affine[:3, 2] = (last.corner - first.corner) / (len(planes) - 1)
    else:
        affine[:3, 2] = np.cross(first.along_row, first.along_column) * (first.thickness or 1.0)
    affine[:3, 3] = first.corner
    return check_affine(LPS @ affine, series.folder)


def _planes(file: Path) -> Iterator[Plane]:
    """Yield the slices that a file holds."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    except BROKEN as error:
        raise FlapsamError(f"{file}: not a readable DICOM file; is it truncated?") from error
    try:
        frames = int(header.get("NumberOfFrames") or 1)
        _check_pixels(file, header, frames)
        for frame in range(frames):
            yield _plane(file, header, frame)
    except BROKEN as error:
        raise FlapsamError(f"{file}: its header is damaged or does not position its slices; export it again") from error


def _check_pixels(file: Path, header: Dataset, frames: int) -> None:
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise FlapsamError(f"{file}: voxels are colours; a volume with one number per voxel is needed")
    claimed = int(header.Rows) * int(header.Columns) * frames * (int(header.BitsAllocated) // 8)
    if not claimed:
        raise FlapsamError(
            f"{file}: the image is empty, with {header.Rows} rows and {header.Columns} columns; export it again"
        )
    if not header.file_meta.TransferSyntaxUID.is_compressed:
        check_claim(file, claimed, compressed=False)


def _plane(file: Path, header: Dataset, frame: int) -> Plane:
    def value(group: str, field: str, default: Any = None) -> Any:
        """The value of a field in the frame's own groups, those that all frames share, or the header itself."""
        places: list[Any] = [header]
        for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            items = header.get(groups)
            if items:
                item = items[0 if groups.startswith("Shared") else frame].get(group)
                places += [item[0]] if item else []
        for place in reversed(places):
            if place.get(field) is not None:
                return place.get(field)
        if default is None:
            raise FlapsamError(f"{file}: its slices have no position in space, because {field} is missing; export it again")
        return default

    directions = np.array(value("PlaneOrientationSequence", "ImageOrientationPatient"), np.float64)
    rows, columns = value("PixelMeasuresSequence", "PixelSpacing")
    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    return Plane(
        file=file,
        frame=frame,
        rows=int(header.Rows),
        columns=int(header.Columns),
        corner=np.array(value("PlanePositionSequence", "ImagePositionPatient"), np.float64),
        along_row=directions[:3],
        along_column=directions[3:],
        spacing=(float(rows), float(columns)),
        slope=float(value("PixelValueTransformationSequence", "RescaleSlope", 1)),
        intercept=float(value("PixelValueTransformationSequence", "RescaleIntercept", 0)),
        range=(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1),
        thickness=float(value("PixelMeasuresSequence", "SliceThickness", 0)),
    )


def _pixels(planes: Sequence[Plane]) -> Iterator[NDArray]:
    """Yield the stored numbers of every slice, decoded one after the other."""
    for file, group in groupby(planes, key=lambda plane: plane.file):
        try:
            yield from iter_pixels(file, indices=[plane.frame for plane in group])
        except BROKEN as error:
            reason = "it has no pixel data" if _has_no_pixels(file) else "its pixel data cannot be read"
            raise FlapsamError(f"{file}: {reason}; export it again") from error


def _has_no_pixels(file: Path) -> bool:
    try:
        return not any(field in pydicom.dcmread(file, defer_size=1024) for field in ("PixelData", "FloatPixelData"))
    except BROKEN:
        return False
