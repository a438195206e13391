"""NIfTI files in and out."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from flapsam.errors import FlapsamError
from flapsam.files import written_whole
from flapsam.volumes.volume import Geometry, Volume, same_geometry

SUFFIXES = (".nii.gz", ".nii")
MODALITIES = 3
"""As many as the network has channels."""
_TOO_MANY = "the network has three channels; leave some out"


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file; hidden files, as macOS archives contain, are not."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def case_name(path: Path) -> str:
    """The file's name without its NIfTI suffix."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def read_geometry(path: Path, *, modalities: bool = False) -> Geometry:
    """Shape and affine, from the header alone.

    Args:
        path: a NIfTI file.
        modalities: whether a fourth axis may hold up to three modalities, which the shape leaves out.

    Raises:
        FlapsamError: the file is missing, no NIfTI, not 3-D, or its affine is singular.
    """
    return _open(path, modalities)[1]


def count_modalities(paths: Sequence[Path]) -> int:
    """Modalities of a case: one file each, or the fourth axis of a single one.

    Raises:
        FlapsamError: as ``read_geometry``; or there are more than three.
    """
    if len(paths) > MODALITIES:
        raise FlapsamError(f"{paths[0]}: the case has {len(paths)} modalities; {_TOO_MANY}")
    image = _open(paths[0], len(paths) == 1)[0]
    return len(paths) if len(paths) > 1 else max(image.shape[3:], default=1)


def read_image(path: Path, *others: Path) -> Volume:
    """Read an image: integers as they are stored, everything else as float32.

    Args:
        path: a 3-D file, or a 4-D one whose last axis holds up to three modalities.
        others: 3-D files of further modalities in the same place.

    Raises:
        FlapsamError: as ``read_geometry``; the data are truncated or hold NaN or infinity; or the files do not lie in the
            same place, or there are more than three.
    """
    count_modalities([path, *others])
    array, affine = _read(path, modalities=not others)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if others:
        arrays = [array]
        for other in others:
            further, other_affine = _read(other)
            if further.shape != array.shape or not same_geometry(affine, other_affine, array.shape):
                raise FlapsamError(f"{other}: it does not lie in the same place as {path}; resample it to that")
            arrays.append(further)
        array = np.stack(arrays, axis=-1)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        broken = int(array.size - np.count_nonzero(np.isfinite(array)))
        if broken:
            raise FlapsamError(f"{path}: {broken} voxels are NaN or infinite; replace them or leave the case out")
    return Volume(array, affine)


def read_label(path: Path) -> Volume:
    """Read a label map as int32, whatever the file stores it as.

    Raises:
        FlapsamError: as ``read_geometry``; or the data are truncated or no whole numbers.
    """
    stored, affine = _read(path)
    array = stored if stored.dtype.kind in "iu" else np.rint(stored)
    if array is not stored and not np.array_equal(array, stored):
        raise FlapsamError(f"{path}: a label map holds whole numbers, this one does not; is it an image?")
    return Volume(array.astype(np.int32), affine)


def write_label_like(labels: NDArray, original: Path, path: Path) -> None:
    """Write a label map with the header geometry of ``original``: the same affine, codes and units, bit for bit.

    Args:
        labels: whole numbers below 256, in the axes of ``original``.
        original: the NIfTI image that was segmented.
        path: where to; written whole or not at all.
    """
    header = _open(original, modalities=True)[0].header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"flapsam label map"
    # No affine given: the header's own qform and sform are kept as they are.
    image = nibabel.Nifti1Image(labels.astype(np.uint8), None, header)
    with written_whole(path) as temporary:
        nibabel.save(image, temporary)


def write_volume(volume: Volume, path: Path) -> None:
    """Write a new NIfTI file in mm from a volume, whole or not at all."""
    image = nibabel.Nifti1Image(volume.array, volume.affine)
    image.header.set_xyzt_units("mm")
    with written_whole(path) as temporary:
        nibabel.save(image, temporary)


def _open(path: Path, modalities: bool = False) -> tuple[nibabel.Nifti1Image, Geometry]:
    try:
        image = nibabel.load(path)
    except FileNotFoundError as error:
        raise FlapsamError(f"{path}: no such file") from error
    except (ImageFileError, EOFError, zlib.error, OSError, ValueError) as error:
        raise FlapsamError(f"{path}: not a readable NIfTI file; is it truncated?") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise FlapsamError(f"{path}: not a NIfTI file; convert it to .nii.gz")
    if len(image.shape) == 4 and modalities:
        if image.shape[3] > MODALITIES:
            raise FlapsamError(f"{path}: the file has {image.shape[3]} modalities; {_TOO_MANY}")
    elif len(image.shape) != 3:
        raise FlapsamError(f"{path}: a 3-D volume is needed, this file has {len(image.shape)} dimensions {image.shape}")
    if 0 in image.shape:
        raise FlapsamError(f"{path}: the volume is empty, its shape is {image.shape}")
    affine = image.affine
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise FlapsamError(f"{path}: the affine is singular, so voxels have no place in space; repair the header")
    i, j, k = image.shape[:3]
    return image, ((i, j, k), affine)


def _read(path: Path, modalities: bool = False) -> tuple[NDArray, NDArray[np.float64]]:
    image, (_, affine) = _open(path, modalities)
    try:
        array = np.asanyarray(image.dataobj)
    except (EOFError, zlib.error, OSError, ValueError) as error:
        raise FlapsamError(f"{path}: the voxels cannot be read; the file is truncated or damaged") from error
    if array.dtype.kind not in "iuf":
        raise FlapsamError(f"{path}: voxels are of type {array.dtype}; convert the file to one plain number a voxel")
    return array, affine
