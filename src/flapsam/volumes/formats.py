"""Images on disk, whatever their format: one way in, one way out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.volumes import nifti
from flapsam.volumes.dicom import Series, find_series, is_dicom, read_series
from flapsam.volumes.dicom_seg import write_dicom_seg
from flapsam.volumes.itk import META, NRRD, read_itk, write_meta_like, write_nrrd_like
from flapsam.volumes.legend import Legend
from flapsam.volumes.volume import Volume, same_geometry

Source = Path | Series
"""What an image is read from."""


@dataclass(frozen=True)
class Format:
    """A way of keeping a volume in a file."""

    suffixes: tuple[str, ...]
    read: Callable[[Path], Volume]
    write_like: Callable[[NDArray, Path, Path, Legend], None]
    """Label map, the image that was segmented, where to, names and colours."""
    written: str
    """Suffix of label maps."""


FORMATS: dict[str, Format] = {
    "NIfTI": Format(nifti.SUFFIXES, nifti.read_nifti, nifti.write_label_like, ".nii.gz"),
    "NRRD": Format(NRRD, read_itk, write_nrrd_like, ".seg.nrrd"),
    "MetaImage": Format(META, read_itk, write_meta_like, ".mha"),
}
_ENDS = sorted({end for form in FORMATS.values() for end in (*form.suffixes, form.written)}, key=len, reverse=True)


def is_image(path: Path) -> bool:
    """Whether the name is that of a volume in one of the formats; hidden files, as macOS archives contain, are not."""
    return path.name.endswith(tuple(_ENDS)) and not path.name.startswith(".")


def case_name(path: Path) -> str:
    """The file's name without its format's suffix."""
    return next((path.name.removesuffix(end) for end in _ENDS if path.name.endswith(end)), path.stem)


def source_at(path: Path) -> Source:
    """What to read at a path: the file, or the one DICOM series of a folder or file.

    Raises:
        FlapsamError: a folder or DICOM file does not hold exactly one series of images.
    """
    if not (path.is_dir() or is_dicom(path)):
        return path
    files = [file for file in sorted(path.iterdir()) if is_dicom(file)] if path.is_dir() else [path]
    found = find_series(path if path.is_dir() else path.parent, files)
    if len(found) != 1:
        titles = f"{len(found)} DICOM series: {', '.join(one.title for one in found)}" if found else "no DICOM image"
        raise FlapsamError(f"{path}: there is {titles}; one series is needed")
    return found[0]


def read_image(source: Source, *others: Path) -> Volume:
    """Read an image: integers as they are stored, everything else as float32.

    Args:
        source: a file or a DICOM series; of NIfTI, a fourth axis may hold up to three modalities.
        others: 3-D files of further modalities in the same place.

    Raises:
        FlapsamError: a file is missing, damaged, of no known format or not 3-D, holds NaN or infinity, or has no place in
            space; or the files do not lie in the same place, or there are more than three.
    """
    if isinstance(source, Series):
        return read_series(source)
    if not others:
        return _format(source).read(source)
    nifti.check_count([source, *others])
    volumes = [_three_dimensional(path) for path in (source, *others)]
    first = volumes[0]
    for path, volume in zip(others, volumes[1:], strict=True):
        if volume.array.shape != first.array.shape or not same_geometry(first.affine, volume.affine, first.array.shape):
            raise FlapsamError(f"{path}: it does not lie in the same place as {source}; resample it to that")
    return Volume(np.stack([volume.array for volume in volumes], axis=-1), first.affine)


def read_label(path: Path) -> Volume:
    """Read a label map as int32, whatever the file stores it as.

    Raises:
        FlapsamError: as ``read_image``; or it holds no whole numbers.
    """
    stored = _three_dimensional(path)
    whole = stored.array if stored.array.dtype.kind in "iu" else np.rint(stored.array)
    if whole is not stored.array and not np.array_equal(whole, stored.array):
        raise FlapsamError(f"{path}: a label map holds whole numbers, this one does not; is it an image?")
    return Volume(whole.astype(np.int32), stored.affine)


def write_labels(
    labels: NDArray, source: Source, affine: NDArray[np.float64], stem: Path, legend: Legend, *, segmentation: bool = True
) -> list[Path]:
    """Write a label map in the format and the place of the image that was segmented; for DICOM a segmentation and NIfTI.

    Args:
        labels: whole numbers below 256, in the image's axes.
        source: the image.
        affine: of the image.
        stem: path of what is written, without suffix.
        legend: names and colours.
        segmentation: whether a DICOM segmentation is wanted, too.

    Returns:
        What was written, first the file that holds the label map as plain numbers.

    Raises:
        FlapsamError: it cannot be written.
    """
    if not isinstance(source, Series):
        form = _format(source)
        target = stem.with_name(stem.name + form.written)
        form.write_like(labels, source, target, legend)
        return [target]
    plain, encoded = stem.with_name(stem.name + ".nii.gz"), stem.with_name(stem.name + ".seg.dcm")
    nifti.write_volume(Volume(labels, affine), plain, legend)
    if not segmentation:
        return [plain]
    try:
        write_dicom_seg(labels, source, encoded, legend)
    except FlapsamError:
        plain.unlink()
        raise
    return [plain, encoded]


def write_probabilities(probabilities: NDArray[np.uint16], source: Source, affine: NDArray[np.float64], path: Path) -> None:
    """Write probabilities (i, j, k, class), of which 65535 is 1, as NIfTI in the place of the image."""
    like = source if isinstance(source, Path) and nifti.is_nifti(source) else None
    nifti.write_probabilities(Volume(probabilities, affine), path, like)


def _three_dimensional(path: Path) -> Volume:
    volume = _format(path).read(path)
    if volume.modalities > 1:
        raise FlapsamError(f"{path}: a 3-D volume is needed, this file has 4 dimensions {volume.array.shape}")
    return volume


def _format(path: Path) -> Format:
    for form in FORMATS.values():
        if path.name.endswith(form.suffixes):
            return form
    known = ", ".join(end for form in FORMATS.values() for end in form.suffixes)
    raise FlapsamError(f"{path}: no image that flapsam reads; it reads {known} and DICOM")
