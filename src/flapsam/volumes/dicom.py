"""DICOM series in: files in any order, compressed or not, one slice a file or all slices in one.

Positions and directions are those of the patient (PS3.3 C.7.6.2 and C.7.6.16.2), spacing comes from the positions, not from
the slices' thickness.
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
"""Share of their usual distance by which slices may stand closer or farther."""
ASIDE = 0.2
"""Share of the smaller spacing by which a slice may lie beside the line from the first to the last."""
ANGLE = 1e-3
"""By which direction cosines of a series may differ."""
IDENTITY = ("SeriesInstanceUID", "SeriesNumber", "SeriesDescription")
BROKEN = (
    *(InvalidDicomError, OSError, EOFError, AttributeError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
"""What pydicom and its decoders raise for files that are not right."""


@dataclass(frozen=True)
class Series:
    """Files of one folder that say they are one series, a slice each; or one file with all slices."""

    folder: Path
    files: tuple[Path, ...]
    uid: str = ""
    number: str = ""
    description: str = ""
    whole_file: bool = False
    """Whether it is a file that stands for itself."""

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.folder)

    @property
    def title(self) -> str:
        """What people know it by."""
        parts = (self.number, f"'{self.description}'" if self.description else "", f"({len(self.files)} files)")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Plane:
    """Where a slice lies and how its numbers are meant."""

    file: Path
    frame: int
    rows: int
    columns: int
    corner: NDArray[np.float64]
    """Centre of the first voxel in mm, to the left, back and head."""
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    spacing: tuple[float, float]
    """In mm from row to row, and from column to column."""
    slope: float
    intercept: float
    range: tuple[int, int]
    """What may be stored."""
    thickness: float


def is_dicom(path: Path) -> bool:
    """Whether a file's name or its first bytes say that it is DICOM; hidden files and DICOMDIR are not."""
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
    """The image series that files of a folder belong to; other objects, such as reports, are left out.

    A file that cannot be read may be a slice of the series; where there are several, or none, it stands for itself.
    ``read_series`` says what is wrong with it.
    """
    found: dict[tuple[str, str, str], list[Path]] = {}
    alone: list[Series] = []
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
            alone.append(Series(folder, (file,), uid, number, description, whole_file=True))
        else:
            found.setdefault((uid, number, description), []).append(file)
    if len(found) == 1:
        next(iter(found.values())).extend(unreadable)
    else:
        alone += [Series(folder, (file,), whole_file=True) for file in unreadable]
    series = [Series(folder, tuple(sorted(members)), *identity) for identity, members in found.items()]
    return sorted(series, key=lambda one: (one.number.zfill(8), one.uid)) + alone


def read_series(series: Series) -> Volume:
    """Read a series: integers where slope and intercept are whole, else float32.

    Raises:
        FlapsamError: a file is damaged or has no pixel data or place in space; slices are missing, stand at uneven
            distances or twice at the same place, or differ in size or direction; or voxels are colours.
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
            raise FlapsamError(f"{plane.file}: its pixel data are of shape {pixels.shape}, its header says another")
        scaled = pixels if (plane.slope, plane.intercept) == (1, 0) else pixels * plane.slope + plane.intercept
        array[:, :, index] = scaled.T
    check_finite(array, series.folder)
    return Volume(array, affine)


def sorted_planes(series: Series) -> list[Plane]:
    """The slices in the order of their places, checked against each other.

    Raises:
        FlapsamError: as ``read_series``.
    """
    planes = [plane for file in series.files for plane in _planes(file)]
    first = planes[0]
    for plane in planes:
        if (plane.rows, plane.columns) != (first.rows, first.columns) or not np.allclose(plane.spacing, first.spacing, 1e-3):
            raise FlapsamError(f"{plane.file}: its slice differs in size or spacing from {first.file.name}; separate them")
        if not np.allclose([plane.along_row, plane.along_column], [first.along_row, first.along_column], atol=ANGLE):
            raise FlapsamError(f"{plane.file}: its slice lies in another direction than {first.file.name}; separate them")
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
            f"{series}: {doubled} slices lie where another lies, so the series holds several volumes, such as time points; "
            "separate them"
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
        f"{series}: its slices stand {steps.min():.4g} to {steps.max():.4g} mm apart, the first odd one after {where}; "
        "resample it to even distances"
    )


def _affine(series: Series, planes: Sequence[Plane]) -> NDArray[np.float64]:
    first, last = planes[0], planes[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing[1]
    affine[:3, 1] = first.along_column * first.spacing[0]
    if len(planes) > 1:
        # Of a tilted gantry this is not the slices' normal.
        affine[:3, 2] = (last.corner - first.corner) / (len(planes) - 1)
    else:
        affine[:3, 2] = np.cross(first.along_row, first.along_column) * (first.thickness or 1.0)
    affine[:3, 3] = first.corner
    return check_affine(LPS @ affine, series.folder)


def _planes(file: Path) -> Iterator[Plane]:
    """The slices that a file holds."""
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
        raise FlapsamError(f"{file}: its header lacks or garbles what places its slices in space") from error


def _check_pixels(file: Path, header: Dataset, frames: int) -> None:
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise FlapsamError(f"{file}: voxels are colours; a volume of one number a voxel is needed")
    claimed = int(header.Rows) * int(header.Columns) * frames * (int(header.BitsAllocated) // 8)
    if not claimed:
        raise FlapsamError(f"{file}: the image is empty, it has {header.Rows} rows and {header.Columns} columns")
    if not header.file_meta.TransferSyntaxUID.is_compressed:
        check_claim(file, claimed, compressed=False)


def _plane(file: Path, header: Dataset, frame: int) -> Plane:
    def found(group: str, field: str, default: Any = None) -> Any:
        """From the frame's own groups, those that all frames share, or the header itself."""
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
            raise FlapsamError(f"{file}: its slices have no place in space, {field} is missing")
        return default

    directions = np.array(found("PlaneOrientationSequence", "ImageOrientationPatient"), np.float64)
    rows, columns = found("PixelMeasuresSequence", "PixelSpacing")
    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    return Plane(
        file=file,
        frame=frame,
        rows=int(header.Rows),
        columns=int(header.Columns),
        corner=np.array(found("PlanePositionSequence", "ImagePositionPatient"), np.float64),
        along_row=directions[:3],
        along_column=directions[3:],
        spacing=(float(rows), float(columns)),
        slope=float(found("PixelValueTransformationSequence", "RescaleSlope", 1)),
        intercept=float(found("PixelValueTransformationSequence", "RescaleIntercept", 0)),
        range=(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1),
        thickness=float(found("PixelMeasuresSequence", "SliceThickness", 0)),
    )


def _pixels(planes: Sequence[Plane]) -> Iterator[NDArray]:
    """What is stored of every slice, unpacked one after the other."""
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
