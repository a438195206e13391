"""Reading and writing NIfTI files."""

import gzip
import json
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import IO, cast

import nibabel
import numpy as np
from nibabel import imageglobals
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.nifti1 import Nifti1Extension
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.base.files import check_file, size_of, written_whole
from flapsam.volumes.allocation import check_claim
from flapsam.volumes.content import GZIP, misnamed
from flapsam.volumes.legend import Legend
from flapsam.volumes.opened import Opened
from flapsam.volumes.quaternion import LongQuaternion, is_too_long, with_unit_quaternion
from flapsam.volumes.read_process import look_apart, read_apart
from flapsam.volumes.volume import Geometry, Volume, check_affine

SUFFIXES = (".nii.gz", ".nii")
UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}
"""Code of a header's unit of length (unknown, metre, millimetre, micrometre) → its length in mm."""
COMMENT = 6
"""Code of a NIfTI extension that holds plain text."""
LABEL_MAP = "flapsam label map"
"""Description in the header of a label map."""
CHUNK = 2**20
"""Number of bytes that are unpacked at once. They fit into a processor's cache."""
EXTENSIONS = 64 * 2**20
"""Largest number of bytes before the voxels, which libraries read at once."""
BROKEN = (
    *(ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError, EOFError, zlib.error, struct.error),
    *(OSError, ValueError, TypeError, ArithmeticError, LookupError),
)
"""Exceptions that nibabel raises for damaged files."""
MODALITIES = 3
"""Largest number of modalities, which is the number of the network's channels."""
_TOO_MANY = "but the network has three channels; leave some out"


def is_nifti(path: Path) -> bool:
    """Whether a file's name is that of a NIfTI file. Hidden files, which archives from macOS contain, do not count."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def read_geometry(path: Path, *, modalities: bool = False) -> Geometry:
    """Read shape and affine from the header alone.

    Args:
        path: the NIfTI file.
        modalities: whether a fourth axis may hold up to three modalities. The shape leaves it out.

    Raises:
        FlapsamError: the file is missing, not NIfTI or not 3-D, or its affine is singular.
    """
    image = look_apart(_open_volume if modalities is False else open_nifti, path, size_of(path))
    return image.geometry


def check_count(paths: Sequence[Path]) -> None:
    """Check that a case has no more modalities than the network has channels.

    Raises:
        FlapsamError: the case has more.
    """
    if len(paths) > MODALITIES:
        raise FlapsamError(f"{paths[0]}: the case has {len(paths)} modalities, {_TOO_MANY}")


def count_modalities(paths: Sequence[Path]) -> int:
    """Number of modalities of a case, which are one file each or the fourth axis of a single file.

    Raises:
        FlapsamError: as ``read_geometry``, or there are more than three modalities.
    """
    check_count(paths)
    image = look_apart(open_nifti if len(paths) == 1 else _open_volume, paths[0], size_of(paths[0]))
    return len(paths) if len(paths) > 1 else max(image.shape[3:], default=1)


def read_nifti(path: Path) -> Volume:
    """Read an image. Integers keep their type, everything else becomes float32. A fourth axis holds modalities.

    Raises:
        FlapsamError: as ``read_geometry``, or there are more than three modalities, or the data are truncated or hold NaN
            or infinity.
    """
    volume = read_apart(open_nifti, path, size_of(path))
    if volume.array.ndim == 4 and volume.array.shape[3] == 1:
        return Volume(volume.array[..., 0], volume.affine)
    return volume


def write_label_like(labels: NDArray, original: Path, path: Path, legend: Legend = ()) -> None:
    """Write a label map with the header geometry of ``original``: the same affine, codes and units, bit for bit.

    Args:
        labels: whole numbers below 256, in the axes of ``original``.
        original: the segmented NIfTI image.
        path: path of the label map, which is written completely or not at all.
        legend: names and colours of the classes, which a header extension stores as JSON.
    """
    header = _derived(original, np.uint8, LABEL_MAP)
    _describe(header, legend)
    # Without an affine, nibabel keeps the header's own qform and sform.
    _save(image_like(labels.astype(np.uint8, copy=False), None, header), path)


def write_fractions(fractions: Volume, path: Path, what: str, original: Path | None = None) -> None:
    """Write fractions as whole numbers, of which readers scale the largest of its type to 1.

    Args:
        fractions: unsigned whole numbers (i, j, k) or (i, j, k, class), and their affine.
        path: path of the file, which is written completely or not at all.
        what: description of the values, which the header stores.
        original: NIfTI image whose header geometry is kept bit for bit, if there is one.
    """
    array = fractions.array
    header = _derived(original, array.dtype.type, what) if original else None
    if header is None:
        image = nibabel.Nifti1Image(array, fractions.affine)
        image.header.set_xyzt_units("mm")
    else:
        image = image_like(array, None, header)
    image.header.set_slope_inter(1 / np.iinfo(array.dtype).max, 0)
    _save(image, path)


def _derived(original: Path, dtype: type, what: str) -> nibabel.Nifti1Header:
    image = _open(original, modalities=True)
    with closing(cast(IO[bytes], image.file_map["image"].fileobj)):
        return header_for(dtype, what, image.header)


def header_for(dtype: type, what: str, original: nibabel.Nifti1Header) -> nibabel.Nifti1Header:
    """A header with the geometry of an image's header, for other voxels on the same grid.

    Args:
        dtype: type of the voxels.
        what: description of the voxels, which the header stores.
        original: header of the image.
    """
    header = original.copy()
    header.extensions.clear()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = what.encode()
    return header


def image_like(array: NDArray, affine: NDArray[np.float64] | None, header: nibabel.Nifti1Header) -> nibabel.Nifti1Image:
    """An image in the header's version of NIfTI. Without an affine, it lies where the header says."""
    # A header of NIfTI-2 that is converted to NIfTI-1 loses its position.
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    return kind(array, affine, header)


def write_volume(volume: Volume, path: Path, legend: Legend = ()) -> None:
    """Write a volume as a new NIfTI file in mm, completely or not at all.

    Args:
        volume: the volume.
        path: path of the file.
        legend: names and colours of the classes, if the volume is a label map.
    """
    image = nibabel.Nifti1Image(volume.array, volume.affine)
    image.header.set_xyzt_units("mm")
    _describe(image.header, legend)
    _save(image, path)


def _describe(header: nibabel.Nifti1Header, legend: Legend) -> None:
    if legend:
        text = json.dumps({"labels": {str(s.value): {"name": s.name, "colour": s.colour} for s in legend}})
        header.extensions.append(Nifti1Extension(COMMENT, text.encode()))


def _save(image: nibabel.Nifti1Image, path: Path) -> None:
    with written_whole(path) as temporary, _silent():
        nibabel.save(image, temporary)


def open_nifti(path: Path, *, modalities: bool = True) -> Opened:
    """Check the header of an image.

    Args:
        path: the NIfTI file.
        modalities: whether a fourth axis may hold up to three modalities.

    Raises:
        FlapsamError: as ``read_nifti``.
    """
    image = _open(path, modalities)
    stored, proxy = np.dtype(image.get_data_dtype()), cast(ArrayProxy, image.dataobj)
    if stored.kind not in "iuf":
        raise FlapsamError(f"{path}: voxels are of type {stored}; convert the file to one plain number per voxel")
    claimed = math.prod(image.shape) * stored.itemsize
    check_claim(path, claimed, compressed=_is_packed(path))
    scaled = proxy.slope != 1 or proxy.inter != 0
    dtype = np.dtype(np.float32) if scaled or stored.kind == "f" else stored.newbyteorder("=")
    shape = _shape(image)
    step = max(CHUNK // (stored.itemsize * math.prod(shape[:-1])), 1)
    trailing = (0,) * (len(image.shape) - len(shape))

    def parts() -> Iterator[NDArray]:
        try:
            for start in range(0, shape[-1], step):
                yield proxy[(..., slice(start, start + step), *trailing)]
        except BROKEN as error:
            raise FlapsamError(
                f"{path}: the voxels cannot be read, because the file is truncated or damaged; copy or export it again"
            ) from error

    return Opened(shape, dtype, affine_of(image, path), parts)


def affine_of(image: nibabel.Nifti1Pair, what: object) -> NDArray[np.float64]:
    """The affine (4, 4) of a NIfTI image, from voxel index to millimetres, whatever the header's unit of length.

    Args:
        image: the image. Its own affine is in the unit of its header.
        what: the image for the error message.

    Raises:
        FlapsamError: the affine is missing or singular, or NIfTI does not define the unit.
    """
    code = int(image.header["xyzt_units"]) & 7
    if code not in UNITS:
        raise FlapsamError(
            f"{what}: its header gives the unit of length as {code}, which NIfTI does not define; set it to 2 (mm)"
        )
    unit = UNITS[code]
    affine = image.affine
    return check_affine(affine if affine is None or unit == 1 else np.diag([unit, unit, unit, 1.0]) @ affine, what)


def _open_volume(path: Path) -> Opened:
    return open_nifti(path, modalities=False)


def _open(path: Path, modalities: bool = False) -> nibabel.Nifti1Image:
    try:
        check_file(path)
        # An open file is decompressed only once, however many parts are read one after another. Whether it is compressed
        # follows from its content, because some programs name every file .nii.gz.
        stream = gzip.open(path) if _is_packed(path) else path.open("rb")  # noqa: SIM115 (the image reads it)
        kind = _kind(path, stream.read(352))
        stream.seek(0)
        with _silent():
            image = _image(kind, stream)
        affine_of(image, path)
    except LongQuaternion as error:
        raise FlapsamError(f"{path}: its quaternion has the length {error}, not 1; repair the header") from error
    except BROKEN as error:
        raise FlapsamError(misnamed(path, "NIfTI")) from error
    shape = _shape(image)
    if len(shape) == 4 and modalities:
        if shape[3] > MODALITIES:
            raise FlapsamError(f"{path}: the file has {shape[3]} modalities, {_TOO_MANY}")
    elif len(shape) != 3:
        raise FlapsamError(f"{path}: a 3-D volume is needed, but this file has {len(image.shape)} dimensions {image.shape}")
    if min(image.shape) < 1:
        raise FlapsamError(f"{path}: the volume is empty, with shape {image.shape}; export it again")
    return image


def _shape(image: nibabel.Nifti1Image) -> tuple[int, ...]:
    """The image's shape, without axes of length one after the third."""
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _image(kind: type[nibabel.Nifti1Image], stream: BufferedIOBase) -> nibabel.Nifti1Image:
    try:
        return kind.from_file_map({"image": FileHolder(fileobj=stream)})
    except ValueError as error:
        if not is_too_long(error):
            raise
        stream.seek(0)
        return with_unit_quaternion(kind, stream)


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP


def _kind(path: Path, start: bytes) -> type[nibabel.Nifti1Image]:
    """The version of NIfTI, after checking that the voxels begin soon, because nibabel reads everything before them."""
    for order in "<>":
        (size,) = struct.unpack_from(f"{order}i", start)
        if size == 348:
            kind, offset = nibabel.Nifti1Image, struct.unpack_from(f"{order}f", start, 108)[0]
        elif size == 540:
            kind, offset = nibabel.Nifti2Image, struct.unpack_from(f"{order}q", start, 168)[0]
        else:
            continue
        if b"ni" in (start[344:346], start[4:6]):
            # Its voxels are in another file.
            break
        if not offset <= EXTENSIONS:
            raise FlapsamError(
                f"{path}: its header places the voxels at byte {offset:.0f}, so it is damaged; export it again"
            )
        return kind
    raise ImageFileError


@contextmanager
def _silent() -> Iterator[None]:
    """Keep nibabel's remarks on a header from the terminal, where they would appear without the name of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = imageglobals.logger.level
        imageglobals.logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            imageglobals.logger.setLevel(before)
