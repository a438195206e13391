"""Compare how flapsam reads images with how others do: made-up volumes, and pydicom's test files.

Each made-up volume has a random shape, orientation, spacing, unit, type of numbers and slope, and a shear where its format
allows one. It is written as NIfTI, NRRD, MetaImage or DICOM, without flapsam. What flapsam reads is compared with an
independent reading by nibabel, SimpleITK or pydicom: voxels, affine, and the volume of a label map in millilitres. The label
map that flapsam writes is read by the same library and must lie where the image lies.

    python benchmarks/agreement.py [COUNT] [FOLDER …]

The test files are those that ship with pydicom, and those in further folders, such as the unpacked package ``pydicom-data``.
"""

import collections
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import nibabel
import nrrd
import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.data import get_testdata_files

from flapsam.base.errors import FlapsamError
from flapsam.volumes import Source, is_dicom, legend_of, read_image, sort_files, source_at, write_labels
from tests.helpers.dicom import save_series

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
RNG = np.random.default_rng(0)
KINDS = (np.uint8, np.int16, np.uint16, np.int32, np.float32)
NIFTI_UNITS = {"mm": 1.0, "meter": 1000.0, "micron": 1e-3, "unknown": 1.0}
NRRD_UNITS = {"mm": 1.0, "m": 1000.0, "microns": 1e-3, "": 1.0, "cm": 10.0}
META_UNITS = {"mm": 1.0, "um": 1e-3, "cm": 10.0, "?": 1.0}
Reading = tuple[NDArray, NDArray]
"""Voxels (i, j, k), and the affine to millimetres in RAS+."""


def random_affine(*, shear: bool) -> NDArray:
    """An affine in mm with a random orientation, spacing and position, in RAS+."""
    rotation, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    if RNG.random() < 0.4:
        rotation = np.eye(3)[RNG.permutation(3)] * RNG.choice([-1, 1], 3)
    skew = np.eye(3)
    skew[0, 1:] = RNG.uniform(-0.3, 0.3, 2) * (shear and RNG.random() < 0.5)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ skew @ np.diag(RNG.uniform(0.3, 5, 3))
    affine[:3, 3] = RNG.uniform(-200, 200, 3)
    return affine


def random_array(kind: type) -> NDArray:
    shape = tuple(RNG.integers(2, 12, 3))
    if np.issubdtype(kind, np.floating):
        return RNG.normal(size=shape).astype(kind)
    info = np.iinfo(kind)
    return RNG.integers(max(info.min, -30_000), min(info.max, 30_000), shape).astype(kind)


def scaled(affine: NDArray, unit: float) -> NDArray:
    return np.diag([unit, unit, unit, 1.0]) @ affine


def nifti(folder: Path) -> tuple[Source, Reading]:
    unit = str(RNG.choice(list(NIFTI_UNITS)))
    array = random_array(RNG.choice(KINDS))  # type: ignore[arg-type]
    kind = nibabel.Nifti1Image if RNG.random() < 0.5 else nibabel.Nifti2Image
    image = kind(array, scaled(random_affine(shear=True), 1 / NIFTI_UNITS[unit]))
    image.header.set_xyzt_units(unit)
    if RNG.random() < 0.4:
        image.header.set_slope_inter(RNG.uniform(0.1, 3), RNG.uniform(-100, 100))
    path = folder / str(RNG.choice(["a.nii", "a.nii.gz", "A.NII.GZ"]))
    nibabel.save(image, path)
    return path, read_nifti(path)


def read_nifti(path: Path) -> Reading:
    image = cast(nibabel.Nifti1Image, nibabel.load(path))
    unit = NIFTI_UNITS[str(image.header.get_xyzt_units()[0])]
    return image.get_fdata(), scaled(np.asarray(image.affine), unit)


def nrrd_file(folder: Path) -> tuple[Source, Reading]:
    unit = str(RNG.choice(list(NRRD_UNITS)))
    array = random_array(RNG.choice(KINDS))  # type: ignore[arg-type]
    path = folder / "a.nrrd"
    if RNG.random() < 0.3:
        spacing = RNG.uniform(0.3, 5, 3) / NRRD_UNITS[unit]
        header = {"spacings": spacing.tolist(), "axis mins": RNG.uniform(-50, 50, 3).tolist()}
        header |= {"units": [unit] * 3} if unit else {}
    else:
        space = str(RNG.choice(["left-posterior-superior", "right-anterior-superior", "LAS"]))
        affine = scaled(random_affine(shear=False), 1 / NRRD_UNITS[unit])
        header = {"space": space, "space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
        header |= {"space units": [unit] * 3} if unit else {}
    nrrd.write(str(path), array, {**header, "encoding": str(RNG.choice(["raw", "gzip"]))}, index_order="F")
    return path, read_nrrd(path)


def read_nrrd(path: Path) -> Reading:
    header = nrrd.read_header(str(path))
    (unit,) = set(header.get("space units", header.get("units", [""])))
    return read_itk(path, NRRD_UNITS[unit])


def read_itk(path: Path, unit: float) -> Reading:
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(), scaled(LPS @ affine, unit)


def meta(folder: Path) -> tuple[Source, Reading]:
    unit = str(RNG.choice(list(META_UNITS)))
    affine = LPS @ scaled(random_affine(shear=False), 1 / META_UNITS[unit])
    image = sitk.GetImageFromArray(random_array(RNG.choice(KINDS)).transpose())  # type: ignore[arg-type]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetMetaData("ITK_VoxelUnits", unit)
    path = folder / str(RNG.choice(["a.mha", "a.mhd"]))
    sitk.WriteImage(image, str(path), useCompression=bool(RNG.random() < 0.5))
    return path, read_meta(path)


def read_meta(path: Path) -> Reading:
    found = re.search(rb"DistanceUnits = (\w+)", path.read_bytes()[:4000])
    return read_itk(path, META_UNITS[found[1].decode() if found else "?"])


def dicom(folder: Path) -> tuple[Source, Reading]:
    affine = random_affine(shear=False)
    # Slices grow along the normal of rows and columns.
    affine[:3, 2] *= np.sign(np.linalg.det(affine[:3, :3]))
    if RNG.random() < 0.4:
        affine[:3, 2] += RNG.uniform(-0.3, 0.3) * affine[:3, 1]
    array = RNG.integers(-1024, 3071, tuple(RNG.integers(2, 12, 3))).astype(np.int16)
    slope, dark = float(RNG.choice([1, 0.5, 2.25])), bool(RNG.random() < 0.3)

    def change(header: pydicom.Dataset, _: int) -> None:
        header.RescaleSlope = slope
        header.PhotometricInterpretation = "MONOCHROME1" if dark else "MONOCHROME2"

    save_series(folder / "series", array, affine, change=change, order=RNG.permutation(array.shape[2]).tolist())
    return source_at(folder / "series"), read_dicom(folder / "series")


def read_dicom(folder: Path) -> Reading:
    """Read slices with pydicom alone, and their position with the formula of PS3.3 C.7.6.2.1.1."""
    slices = [pydicom.dcmread(path) for path in folder.iterdir()]
    along = [np.array(slices[0].ImageOrientationPatient[at : at + 3], float) for at in (0, 3)]
    slices.sort(key=lambda header: float(np.array(header.ImagePositionPatient, float) @ np.cross(along[0], along[1])))
    first, last = (np.array(slices[at].ImagePositionPatient, float) for at in (0, -1))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along[0] * slices[0].PixelSpacing[1], along[1] * slices[0].PixelSpacing[0]
    affine[:3, 2] = (last - first) / (len(slices) - 1)
    affine[:3, 3] = first
    planes = []
    for header in slices:
        pixels = header.pixel_array.astype(float)
        pixels = 2**header.BitsStored - 1 - pixels if header.PhotometricInterpretation == "MONOCHROME1" else pixels
        planes.append((pixels * float(header.RescaleSlope) + float(header.RescaleIntercept)).T)
    return np.stack(planes, axis=-1), LPS @ affine


FORMATS = {
    "NIfTI": (nifti, read_nifti),
    "NRRD": (nrrd_file, read_nrrd),
    "MetaImage": (meta, read_meta),
    "DICOM": (dicom, read_nifti),  # The label map of a series is NIfTI.
}


def disagreement(name: str, folder: Path) -> str:
    """What differs for one volume, or nothing."""
    make, reread = FORMATS[name]
    source, (array, affine) = make(folder)
    volume = read_image(source)
    if volume.array.shape != array.shape or not np.allclose(volume.array, array, rtol=1e-5, atol=1e-3):
        return "voxels"
    if not np.allclose(volume.affine, affine, rtol=1e-5, atol=1e-4):
        return "affine"
    labels = (RNG.random(array.shape) < 0.3).astype(np.uint8)
    written, *_ = write_labels(labels, source, volume.affine, folder / "out" / "a", legend_of(["kidney"]))
    label_array, label_affine = reread(written)
    if not np.array_equal(label_array, labels):
        return "label map"
    if not np.allclose(label_affine, affine, rtol=1e-5, atol=1e-4):
        return "affine of the label map"
    ml = labels.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    ours = labels.sum() * abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    return "" if np.isclose(ml, ours, rtol=1e-5) else "millilitres"


def made_up(count: int) -> None:
    """Compare made-up volumes."""
    agreeing = collections.Counter()
    for index in range(count):
        name = list(FORMATS)[index % len(FORMATS)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                problem = disagreement(name, Path(folder))
            except FlapsamError as error:
                problem = str(error)
        agreeing[name] += not problem
        if problem:
            print(f"{index} {name}: {problem}")
    print(f"{agreeing.total()} of {count} made-up volumes agree:", dict(agreeing))


def rescaled(header: pydicom.Dataset) -> NDArray:
    """The numbers of a file as pydicom decodes them, with the slope and intercept of the file or of each frame."""
    frames = header.get("PerFrameFunctionalGroupsSequence", [])
    groups = [*header.get("SharedFunctionalGroupsSequence", []), *frames]
    if not any("PixelValueTransformationSequence" in group for group in groups):
        return header.pixel_array * float(header.get("RescaleSlope", 1)) + float(header.get("RescaleIntercept", 0))
    numbers = header.pixel_array.astype(np.float64)
    for index, frame in enumerate(frames):
        (group,) = [one for one in (frame, groups[0]) if "PixelValueTransformationSequence" in one][:1]
        (change,) = group.PixelValueTransformationSequence
        numbers[index] = numbers[index] * float(change.RescaleSlope) + float(change.RescaleIntercept)
    return numbers


def test_files(folders: Sequence[Path]) -> None:
    """Read the files that ship with pydicom and those in the folders, and compare the numbers of those that are read."""
    counts, reasons, wrong = collections.Counter(), collections.Counter(), []
    further = [path for folder in folders for path in folder.rglob("*")]
    files = sorted({path for path in (*map(Path, get_testdata_files()), *further) if path.is_file()})
    for path in files:
        if not is_dicom(path):
            counts["no DICOM"] += 1
            continue
        found = sort_files([path])
        if not found.series:
            counts["left out"] += 1
            reasons[found.left_out[0].reason] += 1
            continue
        try:
            volume = read_image(found.series[0])
        except FlapsamError as error:
            counts["refused"] += 1
            reasons[str(error).split(": ", 1)[1]] += 1
            continue
        counts["read"] += 1
        expected = rescaled(pydicom.dcmread(path, force=True))
        # The frames of a file have an order of their own.
        if not np.allclose(np.sort(expected.ravel()), np.sort(volume.array.ravel()), rtol=1e-5):
            wrong.append(path.name)
    print(f"{len(files)} test files:", dict(counts), f"of which {len(wrong)} are wrong", *wrong)
    for reason, number in reasons.most_common():
        print(f"{number:4} {reason}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    made_up(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    test_files([Path(folder) for folder in sys.argv[2:]])
