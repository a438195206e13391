import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel import orientations

from flapsam.base.errors import FlapsamError
from flapsam.volumes import (
    Volume,
    canonical_slice_axis,
    case_name,
    count_modalities,
    is_nifti,
    read_geometry,
    read_image,
    read_label,
    same_geometry,
    slice_count,
    write_label_like,
)
from tests.helpers.sites import AFFINE, load, save

ORIENTATIONS = ["".join(codes) for codes in itertools.product("RL", "AP", "SI")]
ORIENTATIONS += ["ASR", "IPL", "SRA", "PIL", "SAL"]


def stored_as(codes: str, volume: Volume) -> Volume:
    """The same anatomy with other array axes, reoriented by nibabel."""
    change = orientations.ornt_transform(orientations.io_orientation(volume.affine), orientations.axcodes2ornt(tuple(codes)))
    image = nibabel.Nifti1Image(volume.array, volume.affine).as_reoriented(change.tolist())
    assert image.affine is not None
    return Volume(np.asanyarray(image.dataobj), image.affine)


def anatomy() -> Volume:
    """A volume with distinct voxels, anisotropic spacing and an oblique affine."""
    rotation = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1.0, 1.5, 4.0])
    affine[:3, 3] = [-10, 5, 30]
    return Volume(np.arange(4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3), affine)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_canonical_volume_is_the_same_for_every_stored_orientation(codes: str):
    expected = anatomy()
    stored = stored_as(codes, expected)
    canonical = stored.to_canonical()
    np.testing.assert_array_equal(canonical.array, expected.array)
    np.testing.assert_allclose(canonical.affine, expected.affine, atol=1e-12)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_writing_to_the_canonical_view_writes_to_the_volume(codes: str):
    stored = stored_as(codes, anatomy())
    labels = np.zeros(stored.array.shape, int)
    Volume(labels, stored.affine).to_canonical().array[...] = stored.to_canonical().array
    np.testing.assert_array_equal(labels, stored.array)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_slices_are_stacked_along_the_largest_spacing(codes: str):
    stored = stored_as(codes, anatomy())
    assert canonical_slice_axis(stored.affine, "auto") == 2
    assert canonical_slice_axis(stored.affine, "sagittal") == 0
    assert slice_count(stored.geometry[0], stored.affine, "auto") == 3
    assert slice_count(stored.geometry[0], stored.affine, "coronal") == 5


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [((1, 1, 1), 2), ((2, 2, 1), 1), ((2, 1, 2), 2), ((3, 1, 1), 0), ((1, 1.000001, 1), 2)],
)
def test_the_last_axis_is_chosen_among_equal_spacings(spacing: tuple[float, ...], axis: int):
    assert canonical_slice_axis(np.diag([*spacing, 1.0]), "auto") == axis


def test_spacing_is_in_mm():
    assert anatomy().spacing == pytest.approx((1.0, 1.5, 4.0))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_label_maps_keep_the_header_geometry_bit_for_bit(codes: str, tmp_path: Path):
    stored = stored_as(codes, anatomy())
    image = nibabel.Nifti1Image(stored.array, None)
    image.header.set_qform(stored.affine, code=1)
    image.header.set_sform(stored.affine + 1e-3, code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(2, 1)
    nibabel.save(image, tmp_path / "image.nii.gz")
    labels = (stored.array % 3).astype(np.uint8)
    write_label_like(labels, tmp_path / "image.nii.gz", tmp_path / "out" / "label.nii.gz")
    before, after = load(tmp_path / "image.nii.gz"), load(tmp_path / "out" / "label.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    for field in (
        "qform_code",
        "sform_code",
        "pixdim",
        "quatern_b",
        "qoffset_x",
        "srow_x",
        "srow_y",
        "srow_z",
        "xyzt_units",
    ):
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)
    assert after.header.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), labels)


def test_integers_are_read_as_stored_and_scaled_values_as_float32(tmp_path: Path):
    assert read_image(save(np.ones((2, 3, 4), np.int16), tmp_path / "a.nii.gz")).array.dtype == np.int16
    image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.int16), AFFINE)
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "b.nii.gz")
    read = read_image(tmp_path / "b.nii.gz").array
    assert read.dtype == np.float32
    assert (read == 3.5).all() or (read == 1.0).all()


def test_float_label_maps_must_hold_whole_numbers(tmp_path: Path):
    path = save(np.full((2, 3, 4), 2.0, np.float32), tmp_path / "a.nii.gz")
    assert read_label(path).array.dtype == np.int32
    save(np.full((2, 3, 4), 0.5, np.float32), path)
    with pytest.raises(FlapsamError, match="whole numbers"):
        read_label(path)


def test_geometry_is_read_from_the_header_alone(tmp_path: Path):
    path = save(np.zeros((30, 30, 30), np.float32), tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:400])
    shape, affine = read_geometry(path)
    assert shape == (30, 30, 30)
    np.testing.assert_array_equal(affine, AFFINE)


def save_singular(path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), None)
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=2)
    nibabel.save(image, path)


BROKEN = {
    "not a number": (lambda p: save(np.array([[[1.0, np.nan]]], np.float32), p), "1 voxels are NaN or infinite"),
    "two dimensions": (lambda p: save(np.zeros((4, 4), np.float32), p), "a 3-D volume is needed, but this file has 2"),
    "four modalities": (
        lambda p: save(np.zeros((4, 4, 4, 4), np.float32), p),
        "has 4 modalities, but the network has three",
    ),
    "singular affine": (save_singular, "the affine is singular"),
    "colours": (lambda p: save(np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), p), "one plain number"),
    "missing": (lambda p: None, "no such file"),
    "no NIfTI": (lambda p: p.write_bytes(b"hello"), "not a readable NIfTI file"),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(make, message: str, tmp_path: Path):
    path = tmp_path / "image.nii.gz"
    make(path)
    with pytest.raises(FlapsamError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_a_label_map_must_have_three_dimensions(tmp_path: Path):
    with pytest.raises(FlapsamError, match="a 3-D volume is needed, but this file has 4"):
        read_label(save(np.zeros((4, 4, 4, 2), np.uint8), tmp_path / "label.nii.gz"))


def test_modalities_may_be_in_one_file_or_several(tmp_path: Path):
    array = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    combined = save(array, tmp_path / "both.nii.gz")
    first, second = (save(array[..., index], tmp_path / f"case_000{index}.nii.gz") for index in (0, 1))
    for paths in ([combined], [first, second]):
        assert count_modalities(paths) == 2
        volume = read_image(*paths)
        assert (volume.geometry[0], volume.modalities) == ((4, 3, 2), 2)
        np.testing.assert_array_equal(volume.array, array)
    assert count_modalities([first]) == read_image(first).modalities == 1
    single = save(array[..., :1], tmp_path / "single.nii.gz")
    assert read_image(single).array.shape == (4, 3, 2)
    assert read_geometry(combined, modalities=True)[0] == (4, 3, 2)
    with pytest.raises(FlapsamError, match="the case has 4 modalities"):
        read_image(first, first, first, first)
    save(array[..., 1], tmp_path / "moved.nii.gz", np.diag([2.0, 1, 1, 1]))
    with pytest.raises(FlapsamError, match=r"moved.nii.gz: it does not lie in the same place"):
        read_image(first, tmp_path / "moved.nii.gz")


def test_modalities_are_reoriented_with_the_volume(tmp_path: Path):
    array = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    canonical = Volume(array, np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])).to_canonical()
    for index in range(2):
        single = Volume(array[..., index], np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
        np.testing.assert_array_equal(canonical.array[..., index], single.to_canonical().array)


def test_the_label_map_of_a_multimodal_image_is_3d(tmp_path: Path):
    image = save(np.zeros((4, 3, 2, 2), np.float32), tmp_path / "image.nii.gz")
    write_label_like(np.ones((4, 3, 2), np.uint8), image, tmp_path / "label.nii.gz")
    assert read_label(tmp_path / "label.nii.gz").array.shape == (4, 3, 2)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path):
    noise = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    path = save(noise, tmp_path / "image.nii.gz")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(FlapsamError, match="truncated"):
        read_image(path)


def test_affines_agree_within_a_tenth_of_a_voxel():
    moved = AFFINE.copy()
    moved[0, 3] = 0.05
    assert same_geometry(AFFINE, moved, (10, 10, 10))
    moved[0, 3] = 0.2
    assert not same_geometry(AFFINE, moved, (10, 10, 10))
    turned = AFFINE.copy()
    turned[0, 1] = 0.02
    assert not same_geometry(AFFINE, turned, (10, 10, 10))


def test_nifti_files_are_recognised_by_name():
    assert case_name(Path("a/case.01.nii.gz")) == "case.01"
    assert is_nifti(Path("case.nii"))
    assert not is_nifti(Path("._case.nii.gz"))
    assert not is_nifti(Path("case.png"))
