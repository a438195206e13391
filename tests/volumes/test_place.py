"""Where images and label maps lie, and how large they are: unusual but valid headers, and units other than millimetres.

Expected places are worked out by hand or read by SimpleITK and nibabel.
"""

from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.volumes import Volume, labels_like, read_image, read_label, volume_of, write_fractions, write_labels
from flapsam.volumes.itk import affine_of
from tests.helpers.sites import load
from tests.volumes.test_headers import ARRAY, META, NRRD, write

LPS = "space: left-posterior-superior"
LABELS = (ARRAY % 3).astype(np.uint8)


def diagonal(*numbers: float) -> NDArray:
    return np.diag([*numbers, 1.0])


def at(origin: tuple[float, ...], *spacing: float) -> NDArray:
    """The affine in RAS+ of axes along LPS+."""
    affine = diagonal(-spacing[0], -spacing[1], spacing[2])
    affine[:3, 3] = -origin[0], -origin[1], origin[2]
    return affine


VECTORS = "(0.5,0,0) (0,0.25,0) (0,0,3)"
NRRD_PLACES: dict[str, tuple[list[str], NDArray]] = {
    "spacings": (
        [*NRRD, "spacings: 0.5 0.5 3", "axis mins: 10 20 30", "centers: cell cell cell"],
        at((10.25, 20.25, 31.5), 0.5, 0.5, 3),
    ),
    "spacings alone": ([*NRRD, "spacings: 0.5 0.25 3"], at((0, 0, 0), 0.5, 0.25, 3)),
    "centers node": (
        [*NRRD, "spacings: 0.5 0.5 3", "axis mins: 10 20 30", "centers: node node node"],
        at((10, 20, 30), 0.5, 0.5, 3),
    ),
    "spacings in um": ([*NRRD, "spacings: 500 250 3000", 'units: "um" "um" "um"'], at((0, 0, 0), 0.5, 0.25, 3)),
    "none first": (
        [
            *NRRD[:2],
            "dimension: 4",
            "sizes: 1 4 3 2",
            *NRRD[4:],
            LPS,
            f"space directions: none {VECTORS}",
            "kinds: list domain domain domain",
            "space origin: (1,2,3)",
        ],
        at((1, 2, 3), 0.5, 0.25, 3),
    ),
    "none last": (
        [
            *NRRD[:2],
            "dimension: 4",
            "sizes: 4 3 2 1",
            *NRRD[4:],
            LPS,
            f"space directions: {VECTORS} none",
            "kinds: domain domain domain list",
            "space origin: (1,2,3)",
        ],
        at((1, 2, 3), 0.5, 0.25, 3),
    ),
    "no origin": ([*NRRD, LPS, f"space directions: {VECTORS}"], at((0, 0, 0), 0.5, 0.25, 3)),
    "right-anterior-superior": (
        [*NRRD, "space: RAS", f"space directions: {VECTORS}", "space origin: (1,2,3)"],
        np.array([[0.5, 0, 0, 1], [0, 0.25, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]]),
    ),
    "microns": (
        [
            *NRRD,
            LPS,
            "space directions: (500,0,0) (0,250,0) (0,0,3000)",
            "space origin: (1000,2000,3000)",
            'space units: "microns" "microns" "microns"',
        ],
        at((1, 2, 3), 0.5, 0.25, 3),
    ),
    "micro sign": (
        [
            *NRRD,
            LPS,
            "space directions: (500,0,0) (0,250,0) (0,0,3000)",
            'space units: "\N{MICRO SIGN}m" "\N{MICRO SIGN}m" ""',
        ],
        at((0, 0, 0), 0.5, 0.25, 3),
    ),
    "metres": (
        [
            *NRRD,
            "space dimension: 3",
            "space directions: (0.0005,0,0) (0,0.00025,0) (0,0,0.003)",
            'space units: "m" "m" "m"',
        ],
        at((0, 0, 0), 0.5, 0.25, 3),
    ),
    "millimetres": (
        [*NRRD, LPS, f"space directions: {VECTORS}", 'space units: "mm" "mm" "mm"'],
        at((0, 0, 0), 0.5, 0.25, 3),
    ),
}


@pytest.mark.parametrize("name", NRRD_PLACES)
def test_nrrd_label_maps_lie_where_their_image_lies(name: str, tmp_path: Path):
    lines, expected = NRRD_PLACES[name]
    path = write(tmp_path / "scan.nrrd", [*lines, ""])
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, ARRAY)
    np.testing.assert_allclose(volume.affine, expected, rtol=1e-12)
    (written,) = write_labels(LABELS, path, volume.affine, tmp_path / "scan", ())
    assert_same_place_in_itk(path, written)
    voxels, header = nrrd.read(str(written), index_order="F")
    np.testing.assert_array_equal(voxels, LABELS)
    assert header["space directions"].shape == (3, 3)
    np.testing.assert_allclose(read_label(written).affine, expected, rtol=1e-12)


def assert_same_place_in_itk(image: Path, labels: Path) -> None:
    before, after = sitk.ReadImage(str(image)), sitk.ReadImage(str(labels))
    assert after.GetSize() == before.GetSize()
    assert after.GetSpacing() == before.GetSpacing()
    assert after.GetOrigin() == before.GetOrigin()
    assert after.GetDirection() == before.GetDirection()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([LPS, f"space directions: {VECTORS}", 'space units: "px" "px" "px"'], "lengths in 'px'; export it in millimetres"),
        (["spacings: 1 1 3", 'units: "mm" "mm" "s"'], "lengths in 's'"),
        (["spacings: 1 1 3", 'units: "um" "um" "mm"'], "its axes have different units, um, mm"),
        ([LPS, "space directions: (1,0,0) (0,1,0) none"], "fewer than three of its axes have a direction in space"),
    ],
)
def test_nrrd_without_a_known_place_is_refused(lines: list[str], sentence: str, tmp_path: Path):
    with pytest.raises(FlapsamError, match=rf"a\.nrrd: .*{sentence}"):
        read_image(write(tmp_path / "a.nrrd", [*NRRD, *lines, ""]))


@pytest.mark.parametrize(("unit", "length"), [("um", 1e-3), ("mm", 1), ("cm", 10), ("?", 1)])
def test_metaimage_units_are_converted(unit: str, length: float, tmp_path: Path):
    lines = [*META, "ElementSpacing = 500 250 3000", "Offset = 1 2 3", f"DistanceUnits = {unit}", "ElementDataFile = LOCAL"]
    path = write(tmp_path / "a.mha", lines)
    volume = read_image(path)
    expected = at((length, 2 * length, 3 * length), 500 * length, 250 * length, 3000 * length)
    np.testing.assert_allclose(volume.affine, expected)
    (written,) = write_labels(LABELS, path, volume.affine, tmp_path / "out", ())
    assert_same_place_in_itk(path, written)
    np.testing.assert_allclose(read_label(written).affine, expected)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("mm", 1), ("micron", 1e3), ("unknown", 1)])
def test_nifti_units_are_converted_as_by_itk(unit: str, factor: float, kind: type, tmp_path: Path):
    affine = at((1, 2, 3), 0.7, 0.7, 2.5)
    image = kind(ARRAY, diagonal(factor, factor, factor) @ affine)
    image.header.set_xyzt_units(unit)
    path = tmp_path / "a.nii.gz"
    nibabel.save(image, path)
    volume = read_image(path)
    np.testing.assert_allclose(volume.affine, affine, rtol=1e-6)
    np.testing.assert_allclose(volume_of(load(path)).affine, affine, rtol=1e-6)
    (written,) = write_labels(LABELS, path, volume.affine, tmp_path / "out", ())
    np.testing.assert_array_equal(load(written).affine, load(path).affine)
    assert load(written).header.get_xyzt_units()[0] == unit
    np.testing.assert_allclose(read_label(written).affine, affine, rtol=1e-6)
    if kind is nibabel.Nifti1Image:
        np.testing.assert_allclose(volume.affine, affine_of(sitk.ReadImage(str(path))), rtol=1e-6)
        assert_same_place_in_itk(path, written)
    write_fractions(np.zeros((4, 3, 2, 3), np.uint16), path, volume.affine, tmp_path / "p.nii.gz", "probabilities")
    np.testing.assert_array_equal(load(tmp_path / "p.nii.gz").affine, load(path).affine)


def test_a_unit_that_nifti_does_not_define_is_refused(tmp_path: Path):
    image = nibabel.Nifti1Image(ARRAY, np.eye(4))
    image.header["xyzt_units"] = 5
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(FlapsamError, match=r"a\.nii: its header gives the unit of length as 5, .* set it to 2"):
        read_image(tmp_path / "a.nii")


def test_probabilities_of_other_formats_are_written_in_millimetres(tmp_path: Path):
    lines, expected = NRRD_PLACES["microns"]
    path = write(tmp_path / "a.nrrd", [*lines, ""])
    write_fractions(np.zeros((4, 3, 2, 3), np.uint16), path, read_image(path).affine, tmp_path / "p.nii.gz", "probabilities")
    written = load(tmp_path / "p.nii.gz")
    assert written.affine is not None and np.allclose(written.affine, expected)
    assert written.header.get_xyzt_units()[0] == "mm"


def nibabel_images() -> dict[str, Any]:
    """Images of several classes of nibabel, all at the same place."""
    affine = at((1, 2, 3), 0.5, 0.25, 3)
    micron = nibabel.Nifti1Pair(ARRAY, diagonal(1e3, 1e3, 1e3) @ affine)
    micron.header.set_xyzt_units("micron")
    return {
        "NIfTI-1": nibabel.Nifti1Image(ARRAY, affine),
        "NIfTI-2": nibabel.Nifti2Image(ARRAY, affine),
        "pair in microns": micron,
        "MGH": nibabel.MGHImage(np.asarray(ARRAY, np.float32), affine),  # type: ignore[arg-type]
        "Analyze": nibabel.Spm99AnalyzeImage(ARRAY, affine),
    }


@pytest.mark.parametrize("name", nibabel_images())
def test_label_maps_of_nibabel_images_have_their_affine(name: str, tmp_path: Path):
    image = nibabel_images()[name]
    labels = labels_like(LABELS, image)
    np.testing.assert_array_equal(labels.affine, image.affine)
    np.testing.assert_array_equal(np.asanyarray(labels.dataobj), LABELS)
    assert nibabel.aff2axcodes(nibabel.as_closest_canonical(labels).affine) == ("R", "A", "S")
    nibabel.save(labels, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_label(tmp_path / "a.nii.gz").affine, at((1, 2, 3), 0.5, 0.25, 3))


@pytest.mark.parametrize("name", nibabel_images())
def test_an_affine_that_was_changed_in_place_is_respected(name: str, tmp_path: Path):
    image = nibabel_images()[name]
    image.affine[0, 3] += 10
    labels = labels_like(LABELS, image)
    np.testing.assert_array_equal(labels.affine, image.affine)
    nibabel.save(labels, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_label(tmp_path / "a.nii.gz").affine, volume_of(image).affine)


def test_a_saved_label_map_has_the_very_position_of_a_loaded_image(tmp_path: Path):
    affine = np.array([[-0.7000001, 0.01, 0, 13.3], [0.02, 0.69999, 0, 1e-3], [0, 0, 2.51, -7.7], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(ARRAY, affine), tmp_path / "a.nii.gz")
    image = load(tmp_path / "a.nii.gz")
    nibabel.save(labels_like(LABELS, image), tmp_path / "b.nii.gz")
    before, after = image.header, load(tmp_path / "b.nii.gz").header
    for field in (
        "srow_x",
        "srow_y",
        "srow_z",
        "qform_code",
        "sform_code",
        "pixdim",
        "quatern_b",
        "qoffset_x",
        "xyzt_units",
    ):
        np.testing.assert_array_equal(before[field], after[field])


def test_a_simpleitk_image_of_another_dimension_is_refused():
    for dimensions in ([4, 3], [4, 3, 2, 2]):
        with pytest.raises(FlapsamError, match=f"the image has {len(dimensions)} dimensions; a 3-D volume is needed"):
            volume_of(sitk.Image(dimensions, sitk.sitkInt16))


def test_millilitres_do_not_depend_on_the_unit(tmp_path: Path):
    """A voxel of 0.7 × 0.7 × 2.5 mm has 1.225 mm³."""
    for unit, factor in (("meter", 1e-3), ("mm", 1.0), ("micron", 1e3)):
        image = nibabel.Nifti1Image(ARRAY, diagonal(0.7 * factor, 0.7 * factor, 2.5 * factor))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / f"{unit}.nii")
        volume: Volume = read_image(tmp_path / f"{unit}.nii")
        assert abs(np.linalg.det(volume.affine[:3, :3])) == pytest.approx(1.225, rel=1e-6)
