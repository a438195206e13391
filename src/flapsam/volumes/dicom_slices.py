"""The slices of a DICOM series, compressed or not.

Positions and directions are those of the patient (PS3.3 C.7.6.2 and C.7.6.16.2). The distance between slices comes from
their positions, not from their thickness. Only a reading process should read damaged files with this module.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.base.files import check_file
from flapsam.volumes.content import misnamed
from flapsam.volumes.dicom_file import opened
from flapsam.volumes.itk import LPS
from flapsam.volumes.opened import Opened
from flapsam.volumes.pixel_data import check_pixel_data
from flapsam.volumes.series import Series
from flapsam.volumes.volume import check_affine

if TYPE_CHECKING:
    from pydicom import Dataset

LIBRARIES = ("pydicom", "pydicom.encaps", "pydicom.pixels.utils", "jpeg_ls", "gdcm", "numpy.ma")
"""Packages that reading a series needs, which a reading process loads beforehand."""
EVEN = 0.02
"""Tolerance for the distance between slices, as a share of the median distance."""
ASIDE = 0.2
"""Tolerance for a slice beside the line from the first to the last slice, as a share of the smaller pixel spacing."""
ANGLE = 1e-3
"""Tolerance for the direction cosines of a series."""
PLACE = ("ImageOrientationPatient", "ImagePositionPatient", "Rows", "Columns")
IDENTITY = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription"),
    *("NumberOfFrames", *PLACE),
)
"""Fields that say what a file is."""
NEEDED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
"""Fields that every image has whose pixels are whole numbers."""
OTHERS = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "FID", "DOC", "RWV", "ECG", "AU")
"""Modalities of objects that are not images of a series, though some have pixels."""
BROKEN = (
    *(OSError, EOFError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError, zlib.error, struct.error),
)
"""Exceptions that pydicom and its decoders raise for damaged files, apart from InvalidDicomError."""


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
    inverted: bool
    """Whether high numbers are dark (MONOCHROME1)."""
    instance: str
    """UID of the image."""


class Identity(TypedDict):
    """What a file is."""

    uid: str
    """UID of its series."""
    number: str
    description: str
    frames: int
    instance: str
    """UID of the image."""
    place: list[float]
    """Direction cosines and position of the slice, and its rows and columns. Empty if the header has no position."""
    reason: str
    """Reason why it is not an image of a series, empty if it is one."""


def identify_each(files: Sequence[Path]) -> list[Identity | str]:
    """What ``identify`` returns for each file, or the message of its error."""
    return [_tried(file) for file in files]


def _tried(file: Path) -> Identity | str:
    try:
        return identify(file)
    except FlapsamError as error:
        return str(error)


def identify(file: Path) -> Identity:
    """What a file is, by its header.

    Raises:
        FlapsamError: the file is not readable DICOM.
    """
    header, _ = _header(file, [*IDENTITY])
    if not any(header.get(field) for field in ("SOPClassUID", "Rows")):
        raise _unreadable(file)
    try:
        place = [header.get(field) for field in PLACE]
        return Identity(
            uid=str(header.get("SeriesInstanceUID") or ""),
            number=str(header.get("SeriesNumber") or ""),
            description=str(header.get("SeriesDescription") or ""),
            frames=int(header.get("NumberOfFrames") or 1),
            instance=str(header.get("SOPInstanceUID") or ""),
            place=[] if None in place else [float(number) for value in place for number in np.atleast_1d(value)],
            reason=_reason(header),
        )
    except BROKEN as error:
        raise _unreadable(file) from error


def _reason(header: "Dataset") -> str:
    """Reason why a file is not an image of a series, or nothing. A class that an anonymiser made up says nothing."""
    from pydicom.uid import UID

    kind = UID(str(header.get("SOPClassUID", "")))
    known = bool(kind) and kind.name != str(kind)
    if known and "Image Storage" not in kind.name:
        return f"DICOM, but not an image: {kind.name}"
    if not known and str(header.get("Modality")) in OTHERS:
        return f"DICOM, but not an image: {header.Modality}"
    if not known and not (header.get("Rows") and header.get("Columns")):
        return "DICOM without an image"
    return ""


def _header(file: Path, fields: list[str] | None = None) -> tuple["Dataset", int]:
    """A file's header, or some of its fields, and the position of the pixel data in the file."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    check_file(file)
    try:
        with opened(file, pixels=fields is None) as stream:
            header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=fields)  # type: ignore[arg-type]
            return header, stream.tell()
    except (InvalidDicomError, *BROKEN) as error:
        raise _unreadable(file) from error


def _unreadable(file: Path) -> FlapsamError:
    return FlapsamError(misnamed(file, "DICOM"))


def open_series(series: Series) -> Opened:
    """Check the headers of a series.

    Raises:
        FlapsamError: as ``read_series``.
    """
    planes = sorted_planes(series)
    first = planes[0]
    affine = _affine(series, planes)
    low, high = (extreme(extreme(p.slope * v + p.intercept for v in p.range) for p in planes) for extreme in (min, max))
    whole = all(p.slope.is_integer() and p.intercept.is_integer() for p in planes)
    kinds = [kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]

    def parts() -> Iterator[NDArray]:
        for plane, pixels in zip(planes, _pixels(planes), strict=True):
            if pixels.shape != (plane.rows, plane.columns):
                raise FlapsamError(
                    f"{plane.file}: its pixel data have shape {pixels.shape}, but its header says "
                    f"{(plane.rows, plane.columns)}; export it again"
                )
            if plane.inverted:
                # ITK does so, too, so training data that it converted to NIfTI are turned around.
                pixels = sum(plane.range) - pixels.astype(np.int64)
            scaled = pixels if (plane.slope, plane.intercept) == (1, 0) else pixels * plane.slope + plane.intercept
            yield scaled.T[..., None]

    dtype = np.dtype(kinds[0] if whole and kinds else np.float32)
    return Opened((first.columns, first.rows, len(planes)), dtype, affine, parts)


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
    doubled = np.flatnonzero(steps < EVEN * max(usual, 1e-3))
    if len(doubled):
        one, other = planes[int(doubled[0])], planes[int(doubled[0]) + 1]
        if one.instance and one.instance == other.instance and one.file != other.file:
            raise FlapsamError(
                f"{series}: {one.file.name} and {other.file.name} are the same slice (SOP Instance UID), but differ; "
                "remove one of them"
            )
        raise FlapsamError(
            f"{series}: {len(doubled)} slices have the same position as another, such as {one.file.name} and "
            f"{other.file.name}, so the series holds several volumes, such as time points; separate the volumes"
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
    header, start = _header(file)
    missing = [field for field in NEEDED if header.get(field) is None]
    if missing:
        raise FlapsamError(f"{file}: it holds no image, because its header lacks {', '.join(missing)}; export it again")
    try:
        frames = int(header.get("NumberOfFrames") or 1)
        check_pixel_data(file, header, frames, start)
        for frame in range(frames):
            yield _plane(file, header, frame)
    except BROKEN as error:
        raise FlapsamError(f"{file}: its header is damaged or does not position its slices; export it again") from error


def _plane(file: Path, header: "Dataset", frame: int) -> Plane:
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
        inverted=str(header.get("PhotometricInterpretation")).strip() == "MONOCHROME1",
        instance=str(header.get("SOPInstanceUID") or ""),
    )


def _pixels(planes: Sequence[Plane]) -> Iterator[NDArray]:
    """Yield the stored numbers of every slice, decoded one after the other."""
    from pydicom.errors import InvalidDicomError
    from pydicom.pixels.utils import iter_pixels

    for file, group in groupby(planes, key=lambda plane: plane.file):
        try:
            with opened(file) as stream:
                yield from iter_pixels(stream, indices=[plane.frame for plane in group])
        except (InvalidDicomError, *BROKEN) as error:
            reason = "it has no pixel data" if _has_no_pixels(file) else "its pixel data cannot be read"
            raise FlapsamError(f"{file}: {reason}; export it again") from error


def _has_no_pixels(file: Path) -> bool:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with opened(file) as stream:
            header = pydicom.dcmread(stream, specific_tags=["PixelData", "FloatPixelData"])
        return not header
    except (InvalidDicomError, *BROKEN):
        return False
