"""NIfTI files in and out."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.base.files import written_whole
from flapsam.volumes.allocation import check_claim, room
from flapsam.volumes.legend import Legend
from flapsam.volumes.volume import Geometry, Volume, check_affine, check_finite

SUFFIXES = (".nii.gz", ".nii")
COMMENT = 6
"""Code of a NIfTI extension that holds plain text."""
LABEL_MAP = "flapsam label map"
"""What the header of one says that it is."""
CHUNK = 32 * 2**20
"""Bytes that are unpacked at once."""
MODALITIES = 3
"""As many as the network has channels."""
_TOO_MANY = "the network has three channels; leave some out"


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file; hidden files, as macOS archives contain, are not."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def read_geometry(path: Path, *, modalities: bool = False) -> Geometry:
    """Shape and affine, from the header alone.

    Args:
        path: a NIfTI file.
        modalities: whether a fourth axis may hold up to three modalities, which the shape leaves out.

    Raises:
        FlapsamError: the file is missing, no NIfTI, not 3-D, or its affine is singular.
    """
    return _open(path, modalities)[1]


def check_count(paths: Sequence[Path]) -> None:
    """Raise FlapsamError if these are more modalities of a case than the network has channels."""
    if len(paths) > MODALITIES:
        raise FlapsamError(f"{paths[0]}: the case has {len(paths)} modalities; {_TOO_MANY}")


def count_modalities(paths: Sequence[Path]) -> int:
    """Modalities of a case: one file each, or the fourth axis of a single one.

    Raises:
        FlapsamError: as ``read_geometry``; or there are more than three.
    """
    check_count(paths)
    image = _open(paths[0], len(paths) == 1)[0]
    return len(paths) if len(paths) > 1 else max(image.shape[3:], default=1)


def read_nifti(path: Path) -> Volume:
    """Read an image: integers as they are stored, everything else as float32; a fourth axis holds modalities.

    Raises:
        FlapsamError: as ``read_geometry``; there are more than three modalities; or the data are truncated or hold NaN or
            infinity.
    """
    image, (_, affine) = _open(path, modalities=True)
    array = _unpacked(path, image)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    check_finite(array, path)
    return Volume(array, affine)


def write_label_like(labels: NDArray, original: Path, path: Path, legend: Legend = ()) -> None:
    """Write a label map with the header geometry of ``original``: the same affine, codes and units, bit for bit.

    Args:
        labels: whole numbers below 256, in the axes of ``original``.
        original: the NIfTI image that was segmented.
        path: where to; written whole or not at all.
        legend: names and colours, kept as JSON in an extension of the header.
    """
    header = _derived(original, np.uint8, LABEL_MAP)
    _describe(header, legend)
    # No affine given: the header's own qform and sform are kept as they are.
    _save(nibabel.Nifti1Image(labels.astype(np.uint8, copy=False), None, header), path)


def write_probabilities(probabilities: Volume, path: Path, original: Path | None = None) -> None:
    """Write probabilities (i, j, k, class) of which 65535 is 1; whoever reads the file gets them from 0 to 1.

    Args:
        probabilities: whole numbers, and their place.
        path: where to; written whole or not at all.
        original: the NIfTI image whose header geometry is kept bit for bit, if there is one.
    """
    header = _derived(original, np.uint16, "flapsam probabilities") if original else None
    image = nibabel.Nifti1Image(probabilities.array, None if original else probabilities.affine, header)
    image.header.set_slope_inter(1 / 65535, 0)
    _save(image, path)


def _derived(original: Path, dtype: type, what: str) -> nibabel.Nifti1Header:
    return header_for(dtype, what, _open(original, modalities=True)[0].header)


def header_for(dtype: type, what: str, original: nibabel.Nifti1Header) -> nibabel.Nifti1Header:
    """The header of an image with its geometry, for other voxels in the same place.

    Args:
        dtype: of the voxels.
        what: they are, in words.
        original: of the image.
    """
    header = original.copy()
    header.extensions.clear()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = what.encode()
    return header


def write_volume(volume: Volume, path: Path, legend: Legend = ()) -> None:
    """Write a new NIfTI file in mm from a volume, whole or not at all; with names and colours if it is a label map."""
    image = nibabel.Nifti1Image(volume.array, volume.affine)
    image.header.set_xyzt_units("mm")
    _describe(image.header, legend)
    _save(image, path)


def _describe(header: nibabel.Nifti1Header, legend: Legend) -> None:
    if legend:
        text = json.dumps({"labels": {str(s.value): {"name": s.name, "colour": s.colour} for s in legend}})
        header.extensions.append(Nifti1Extension(COMMENT, text.encode()))


def _save(image: nibabel.Nifti1Image, path: Path) -> None:
    with written_whole(path) as temporary:
        nibabel.save(image, temporary)


def _open(path: Path, modalities: bool = False) -> tuple[nibabel.Nifti1Image, Geometry]:
    try:
        # Kept open, a compressed file is unpacked in one go, however many parts are read one after the other.
        image = nibabel.load(path, keep_file_open=True)
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
    if min(image.shape) < 1:
        raise FlapsamError(f"{path}: the volume is empty, its shape is {image.shape}")
    affine = check_affine(image.affine, path)
    i, j, k = image.shape[:3]
    return image, ((i, j, k), affine)


def _unpacked(path: Path, image: nibabel.Nifti1Image) -> NDArray:
    """Integers as they are stored, everything else as float32; a part of the volume after the other."""
    stored, proxy = np.dtype(image.get_data_dtype()), cast(ArrayProxy, image.dataobj)
    if stored.kind not in "iuf":
        raise FlapsamError(f"{path}: voxels are of type {stored}; convert the file to one plain number a voxel")
    check_claim(path, math.prod(image.shape) * stored.itemsize, compressed=path.name.endswith(".gz"))
    scaled = proxy.slope != 1 or proxy.inter != 0
    array = room(path, image.shape, np.float32 if scaled or stored.kind == "f" else stored.newbyteorder("="))
    step = max(CHUNK // (stored.itemsize * math.prod(image.shape[:-1])), 1)
    try:
        for start in range(0, image.shape[-1], step):
            array[..., start : start + step] = proxy[..., start : start + step]
    except (EOFError, zlib.error, OSError, ValueError) as error:
        raise FlapsamError(f"{path}: the voxels cannot be read; the file is truncated or damaged") from error
    return array
