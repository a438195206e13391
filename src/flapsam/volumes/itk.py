"""Reading and writing NRRD and MetaImage files."""

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.base.files import size_of, written_whole
from flapsam.volumes.allocation import check_memory
from flapsam.volumes.header_text import Header
from flapsam.volumes.legend import Legend
from flapsam.volumes.lengths import UNKNOWN, millimetres
from flapsam.volumes.meta_header import check_meta
from flapsam.volumes.nrrd_header import check_nrrd, place_of
from flapsam.volumes.opened import Opened
from flapsam.volumes.read_process import look_apart, read_apart
from flapsam.volumes.volume import Volume, check_affine

if TYPE_CHECKING:
    import SimpleITK

LIBRARIES = ("SimpleITK",)
"""Packages that reading an image needs, which a reading process loads beforehand."""
BROKEN = (EOFError, ValueError, OSError, zlib.error)
"""Exceptions that reading voxels raises for damaged files."""
NRRD = (".nrrd", ".nhdr")
META = (".mha", ".mhd")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Affine from LPS+, the world space of ITK and DICOM whose axes point to the left, back and head, to RAS+."""


def read_itk(path: Path) -> Volume:
    """Read an image. Integers keep their type, floating-point numbers become float32.

    Raises:
        FlapsamError: the file is missing, damaged or not 3-D, has more than one number per voxel, or holds NaN or infinity.
    """
    return read_apart(open_itk, path, size_of(path))


def open_itk(path: Path) -> Opened:
    """Check the header of an image. Damaged headers can crash ITK, so only a reading process should call this.

    Raises:
        FlapsamError: as ``read_itk``.
    """
    import SimpleITK as sitk

    header, reader = _opened(path)
    place = header.stored
    shape = reader.GetSize()
    if len(shape) != 3:
        raise FlapsamError(f"{path}: a 3-D volume is needed, but this file has {len(shape)} dimensions {shape}")
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1:
        raise FlapsamError(f"{path}: voxels are of type {kind}; convert the file to one plain number per voxel")
    stored = sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], reader.GetPixelID())).dtype
    if stored.kind not in "iuf":
        raise FlapsamError(f"{path}: voxels are of type {kind}; convert the file to one plain number per voxel")
    check_memory(path, math.prod(shape) * stored.itemsize)

    if place is not None and place.size != stored.itemsize:
        raise FlapsamError(
            f"{path}: voxels are of type {kind}, but the file stores {place.size} bytes each; export it again"
        )

    def parts() -> Iterator[NDArray]:
        try:
            if place is not None:
                yield from place.parts(shape, stored)
                return
            image = reader.Execute()
        except (RuntimeError, *BROKEN) as error:
            raise FlapsamError(
                f"{path}: the voxels cannot be read, because the file is truncated or damaged; copy or export it again"
            ) from error
        for slice_ in sitk.GetArrayViewFromImage(image):
            yield slice_.T[..., None]

    dtype = np.dtype(np.float32) if stored.kind == "f" else stored
    unit = millimetres(header.units, path)
    affine = np.diag([unit, unit, unit, 1.0]) @ affine_of(reader)
    return Opened(shape, dtype, check_affine(affine, path), parts)


def _opened(path: Path) -> tuple[Header, "SimpleITK.ImageFileReader"]:
    """The checked header of a file, and ITK's reader of it."""
    import SimpleITK as sitk

    is_nrrd = path.name.lower().endswith(NRRD)
    header = (check_nrrd if is_nrrd else check_meta)(path)
    reader = sitk.ImageFileReader()
    # Otherwise ITK would choose by the content, and parse a header that was not checked.
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = str(error).strip().rsplit("ReadImageInformation: ", 1)[-1].splitlines()[-1].rstrip(".")
        raise FlapsamError(f"{path}: ITK cannot read its header ({reason[:200]}); export it again") from error
    return header, reader


def _place(path: Path) -> dict[str, list[float]]:
    """Origin, spacing and direction as ITK reads them, in the file's own unit."""
    _, reader = _opened(path)
    return {
        "origin": list(reader.GetOrigin()),
        "spacing": list(reader.GetSpacing()),
        "direction": list(reader.GetDirection()),
    }


def affine_of(image: "SimpleITK.Image | SimpleITK.ImageFileReader") -> NDArray[np.float64]:
    """The affine (4, 4) of a SimpleITK image or of its header, from voxel index to millimetres in RAS+."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


def write_nrrd_like(labels: NDArray, original: Path, path: Path, legend: Legend = ()) -> None:
    """Write a label map as a segmentation of 3D Slicer, with the fields of ``original``'s header that give its position.

    Args:
        labels: whole numbers below 256, in the axes of ``original``.
        original: the segmented NRRD image.
        path: path of the label map, which is written completely or not at all.
        legend: names and colours of the classes.
    """
    import nrrd

    header = check_nrrd(original)
    # ITK splits the directions into units and spacing, which changes their last bits, so the header's own are kept.
    place = place_of(header.fields)
    if place is None:
        itk = look_apart(_place, original, size_of(original))
        directions = (np.reshape(itk["direction"], (3, 3)) * itk["spacing"]).T
        place = {"space": "left-posterior-superior", "space directions": directions, "space origin": np.array(itk["origin"])}
    unit = next(filter(None, header.units), "")
    # NRRD is ASCII, and the only known unit that is not is the micrometre.
    place |= {"space units": [unit if unit.isascii() else "um"] * 3} if unit else {}
    with written_whole(path) as temporary:
        nrrd.write(
            str(temporary),
            labels.astype(np.uint8, copy=False),
            {**place, "encoding": "gzip", **slicer_fields(legend, labels.shape)},
            index_order="F",
            compression_level=1,
        )


def write_meta_like(labels: NDArray, original: Path, path: Path, legend: Legend = ()) -> None:
    """Write a label map as MetaImage, with the position of ``original`` and the fields of 3D Slicer.

    Args:
        labels: whole numbers below 256, in the axes of ``original``.
        original: the segmented MetaImage file.
        path: path of the label map, which is written completely or not at all.
        legend: names and colours of the classes.

    Raises:
        FlapsamError: the file cannot be written.
    """
    import SimpleITK as sitk

    place = look_apart(_place, original, size_of(original))
    image = sitk.GetImageFromArray(labels.astype(np.uint8, copy=False).transpose())
    image.SetOrigin(place["origin"])
    image.SetSpacing(place["spacing"])
    image.SetDirection(place["direction"])
    (unit,) = check_meta(original).units
    if unit not in UNKNOWN:
        image.SetMetaData("ITK_VoxelUnits", unit)
    for field, value in slicer_fields(legend, labels.shape).items():
        image.SetMetaData(field, value)
    with written_whole(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True, compressionLevel=1)
        except RuntimeError as error:
            raise FlapsamError(f"{path}: cannot be written; is the disk full?") from error


def slicer_fields(legend: Legend, shape: tuple[int, ...]) -> dict[str, str]:
    """Header fields with names and colours, as 3D Slicer reads them from a segmentation."""
    fields = {}
    for index, segment in enumerate(legend):
        fields |= {
            f"Segment{index}_ID": f"Segment_{segment.value}",
            f"Segment{index}_Name": segment.name,
            f"Segment{index}_Color": " ".join(f"{part / 255:.6f}" for part in segment.rgb),
            f"Segment{index}_LabelValue": str(segment.value),
            f"Segment{index}_Layer": "0",
            f"Segment{index}_Extent": " ".join(f"0 {size - 1}" for size in shape),
        }
    return fields
