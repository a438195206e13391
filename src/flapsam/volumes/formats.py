"""Reading and writing images on disk, whatever their format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.volumes import nifti
from flapsam.volumes.content import what_it_is
from flapsam.volumes.dicom import read_series, sort_files
from flapsam.volumes.dicom_seg import write_dicom_seg
from flapsam.volumes.itk import META, NRRD, read_itk, write_meta_like, write_nrrd_like
from flapsam.volumes.legend import Legend
from flapsam.volumes.series import Series, is_dicom
from flapsam.volumes.volume import Volume, order_of
from flapsam.volumes.whole import whole_labels

Source = Path | Series
"""An image on disk: a file, or a DICOM series."""


@dataclass(frozen=True)
class Format:
    """A file format for volumes."""

    suffixes: tuple[str, ...]
    read: Callable[[Path], Volume]
    write_like: Callable[[NDArray, Path, Path, Legend], None]
    """Function that writes a label map. It takes the label map, the segmented image, the target path, and the legend."""
    written: str
    """Suffix of the label maps that are written."""


FORMATS: dict[str, Format] = {
    "NIfTI": Format(nifti.SUFFIXES, nifti.read_nifti, nifti.write_label_like, ".nii.gz"),
    "NRRD": Format(NRRD, read_itk, write_nrrd_like, ".seg.nrrd"),
    "MetaImage": Format(META, read_itk, write_meta_like, ".mha"),
}
_ENDS = sorted({end for form in FORMATS.values() for end in (*form.suffixes, form.written)}, key=len, reverse=True)


def is_image(path: Path) -> bool:
    """Whether a file's name is that of a volume in one of the formats.

    Hidden files, which archives from macOS contain, do not count.
    """
    return path.name.lower().endswith(tuple(_ENDS)) and not path.name.startswith(".")


def case_name(path: Path) -> str:
    """The file's name without the suffix of its format."""
    return next((path.name[: -len(end)] for end in _ENDS if path.name.lower().endswith(end)), path.stem)


def source_at(path: Path) -> Source:
    """The image at a path: the file itself, or the one DICOM series of a folder, with those below it, or of a file.

    Raises:
        FlapsamError: a folder or a DICOM file does not hold exactly one series of images.
    """
    if not (path.is_dir() or is_dicom(path)):
        return path
    files = [file for file in sorted(path.rglob("*")) if is_dicom(file)] if path.is_dir() else [path]
    found = sort_files(files)
    # Files in the folder itself come first, and those below it count only if there are none.
    all_series = [series for series in found.series if any(file.parent == path for file in series.files)] or found.series
    if len(all_series) != 1:
        titles = ", ".join(series.title for series in all_series)
        reasons = "".join(f" ({reason})" for reason in dict.fromkeys(one.reason for one in found.left_out))
        content = f"holds {len(all_series)} DICOM series ({titles})" if all_series else f"holds no DICOM image{reasons}"
        raise FlapsamError(f"{path}: {content}; exactly one series is needed")
    return all_series[0]


def read_image(source: Source, *others: Path) -> Volume:
    """Read an image. Integers keep their type, everything else becomes float32.

    Args:
        source: a file or a DICOM series. The fourth axis of a NIfTI file may hold up to three modalities.
        others: 3-D files of further modalities, on the same grid.

    Raises:
        FlapsamError: a file is missing, damaged, of an unknown format or not 3-D, holds NaN or infinity, or has no
            position in space. Or the files are not on the same grid, or there are more than three.
    """
    if isinstance(source, Series):
        return read_series(source)
    if not others:
        return _format(source).read(source)
    nifti.check_count([source, *others])
    volumes = [_three_dimensional(path) for path in (source, *others)]
    first = volumes[0]
    for path, volume in zip(others, volumes[1:], strict=True):
        if order_of(volume.geometry, first.geometry) is None:
            raise FlapsamError(f"{path}: it does not lie in the same place as {source}; resample it to that image's grid")
    return Volume(np.stack([volume.ordered_as(first.geometry).array for volume in volumes], axis=-1), first.affine)


def read_label(path: Path) -> Volume:
    """Read a label map as int32, whatever type the file stores. Numbers within 0.001 of a whole number are rounded.

    Raises:
        FlapsamError: as ``read_image``, or the file holds numbers that are not whole or that are too large.
    """
    stored = _three_dimensional(path)
    return Volume(whole_labels(stored.array, path), stored.affine)


def write_labels(
    labels: NDArray, source: Source, affine: NDArray[np.float64], stem: Path, legend: Legend, *, segmentation: bool = True
) -> list[Path]:
    """Write a label map in the format and at the position of the segmented image.

    The label map of a DICOM series is written as a NIfTI file and as a DICOM segmentation.

    Args:
        labels: whole numbers below 256, in the image's axes.
        source: the segmented image.
        affine: affine of the image.
        stem: path of the written files, without suffix.
        legend: names and colours of the classes.
        segmentation: whether to write the DICOM segmentation, too.

    Returns:
        Paths of the written files. The first file holds the label map as plain numbers.

    Raises:
        FlapsamError: a file cannot be written.
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


def write_fractions(
    fractions: NDArray[np.unsignedinteger], source: Source, affine: NDArray[np.float64], path: Path, what: str
) -> None:
    """Write fractions as NIfTI, at the position of the image. The largest number of their type means 1.

    Args:
        fractions: unsigned whole numbers (i, j, k) or (i, j, k, class).
        source: the image.
        affine: its matrix from voxel indices to millimetres.
        path: path of the file.
        what: description of the values, which the header stores.
    """
    like = source if isinstance(source, Path) and nifti.is_nifti(source) else None
    nifti.write_fractions(Volume(fractions, affine), path, what, like)


def _three_dimensional(path: Path) -> Volume:
    volume = _format(path).read(path)
    if volume.modalities > 1:
        raise FlapsamError(f"{path}: a 3-D volume is needed, but this file has 4 dimensions {volume.array.shape}")
    return volume


def _format(path: Path) -> Format:
    for form in FORMATS.values():
        if path.name.lower().endswith(form.suffixes):
            return form
    known = ", ".join(end for form in FORMATS.values() for end in form.suffixes)
    found = what_it_is(path) if path.is_file() else None
    what, advice = (f", but {found[0]}", found[1]) if found else ("", f"convert it to {known} or DICOM")
    raise FlapsamError(f"{path}: not an image format that flapsam reads{what}; {advice}")
