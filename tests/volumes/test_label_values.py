"""Label maps whose values, axes or quaternions are sound but odd, checked against arithmetic and against SimpleITK."""

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from flapsam.base.errors import FlapsamError
from flapsam.volumes import read_geometry, read_image, read_label, write_label_like
from tests.helpers.sites import load

LABELS = np.zeros((5, 4, 3), np.int64)
LABELS[1:3, 1:3, 1], LABELS[3, 1:3, 1] = 1, 2


def stored(path: Path, array: np.ndarray, slope: float = 1, inter: float = 0) -> Path:
    image = nibabel.Nifti1Image(array, np.diag([1, 1, 3, 1]), dtype=array.dtype)
    image.header.set_slope_inter(slope, inter)
    nibabel.save(image, path)
    return path


NEARLY_WHOLE = {
    "float32 off by rounding": (LABELS * np.float32(0.9999999), 1, 0),
    "float64 off by rounding": (LABELS * 1.0000000001, 1, 0),
    "off by 0.001": ((LABELS * 0.9995).astype(np.float32), 1, 0),
    "below zero": ((LABELS - 0.0004).astype(np.float32), 1, 0),
    "int16 over its whole range": ((LABELS * 32767 // 2).astype(np.int16), 2 / 32766, 0),
    "uint8 with a slope of 1/127": ((LABELS * 127).astype(np.uint8), 1 / 127, 0),
    "int16 with an intercept": ((LABELS * 10 - 5).astype(np.int16), 0.1, 0.5),
    "int8": (LABELS.astype(np.int8), 1, 0),
    "uint64": (LABELS.astype(np.uint64), 1, 0),
    "big-endian": (LABELS.astype(">i4"), 1, 0),
}


@pytest.mark.parametrize(("array", "slope", "inter"), NEARLY_WHOLE.values(), ids=NEARLY_WHOLE)
def test_nearly_whole_values_are_rounded(array: np.ndarray, slope: float, inter: float, tmp_path: Path):
    labels = read_label(stored(tmp_path / "a.nii.gz", array, slope, inter))
    assert labels.array.dtype == np.int32
    np.testing.assert_array_equal(labels.array, LABELS)


REFUSED = {
    "an image": (np.where(LABELS == 2, 1.25, LABELS).astype(np.float32), "holds 1.25 at voxel (3, 1, 1)"),
    "just beyond the tolerance": (np.where(LABELS == 2, 2.0015, LABELS), "holds 2.0015 at voxel (3, 1, 1)"),
    "2 ** 32 + 1": (np.where(LABELS == 1, 2**32 + 1, LABELS), "label value 4294967297 "),
    "the largest uint64": (np.where(LABELS == 1, 2**64 - 1, LABELS).astype(np.uint64), "label value 18446744073709551615 "),
    "uint32 that int32 wraps": (np.where(LABELS == 1, 2**31, LABELS).astype(np.uint32), "label value 2147483648 "),
    "int64 below int32": (np.where(LABELS == 1, -(2**31) - 7, LABELS), "label value -2147483655 "),
    "a float that int32 wraps": (np.where(LABELS == 1, 1e10, LABELS), "label value 1e+10 "),
    "a float that float32 rounds": (np.where(LABELS == 1, 2.0**24 + 1, LABELS), "label value 16777216 "),
}


@pytest.mark.parametrize(("array", "message"), REFUSED.values(), ids=REFUSED)
def test_values_that_are_not_whole_or_too_large_are_refused_with_the_value(array: np.ndarray, message: str, tmp_path: Path):
    path = stored(tmp_path / "a.nii.gz", array)
    with pytest.raises(FlapsamError) as caught:
        read_label(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("end", [".nrrd", ".mha"])
def test_values_of_other_formats_are_never_wrapped(end: str, tmp_path: Path):
    image = sitk.GetImageFromArray(np.where(LABELS == 1, 2**32 + 1, LABELS).T)
    sitk.WriteImage(image, str(tmp_path / f"a{end}"))
    with pytest.raises(FlapsamError, match="label value 4294967297 "):
        read_label(tmp_path / f"a{end}")


@pytest.mark.parametrize("shape", [(5, 4, 3, 1), (5, 4, 3, 1, 1), (5, 4, 1, 1), (5, 1, 1, 1, 1, 1)])
def test_trailing_axes_of_length_one_are_left_out(shape: tuple[int, ...], tmp_path: Path):
    expected = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = stored(tmp_path / "a.nii.gz", expected)
    expected = expected.reshape(shape[:3])
    np.testing.assert_array_equal(read_label(path).array, expected)
    np.testing.assert_array_equal(read_image(path).array, expected)
    assert read_geometry(path)[0] == shape[:3]
    write_label_like(expected.astype(np.uint8), path, tmp_path / "out.nii.gz")
    assert load(tmp_path / "out.nii.gz").shape == shape[:3]


def test_modalities_before_a_trailing_axis_stay(tmp_path: Path):
    array = np.arange(120, dtype=np.int16).reshape(5, 4, 3, 2, 1)
    np.testing.assert_array_equal(read_image(stored(tmp_path / "a.nii.gz", array)).array, array[..., 0])


def with_quaternion(path: Path, b: float, c: float, d: float, kind: type[nibabel.Nifti1Image]) -> Path:
    """A file whose header has this quaternion alone, written past nibabel, which would refuse it."""
    image = kind(np.arange(60, dtype=np.int16).reshape(5, 4, 3), None)
    image.header.set_qform(np.diag([1, 2, 3, 1]), 1)
    nibabel.save(image, path)
    raw = bytearray(path.read_bytes())
    place, form = (352, "<3d") if kind is nibabel.Nifti2Image else (256, "<3f")
    struct.pack_into(form, raw, place, b, c, d)
    path.write_bytes(raw)
    return path


LONG = [(0.70711, 0.70711, 0.0), (0.7072, 0.0, 0.7072), (0.6, 0.8, 0.01), (0.0, 0.0, 1.0001), (0.71, 0.71, 0.0)]


@pytest.mark.parametrize("quaternion", LONG)
def test_a_quaternion_slightly_too_long_is_read_as_in_itk(quaternion: tuple[float, float, float], tmp_path: Path):
    path = with_quaternion(tmp_path / "a.nii", *quaternion, nibabel.Nifti1Image)
    volume, image = read_image(path), sitk.ReadImage(str(path))
    expected = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing() * np.array([[-1], [-1], [1]])
    np.testing.assert_allclose(volume.affine[:3, :3], expected, atol=1e-5)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).T)
    # nibabel reads what is written.
    write_label_like(np.zeros((5, 4, 3), np.uint8), path, tmp_path / "out.nii.gz")
    np.testing.assert_allclose(np.asarray(load(tmp_path / "out.nii.gz").affine), volume.affine, atol=1e-6)


def test_the_quaternion_of_a_nifti_2_file_may_be_slightly_too_long(tmp_path: Path):
    path = with_quaternion(tmp_path / "a.nii", 0.7072, 0.7072, 0, nibabel.Nifti2Image)
    # Half a turn around the diagonal swaps the first two axes and turns the third.
    np.testing.assert_allclose(read_image(path).affine[:3, :3], [[0, 2, 0], [1, 0, 0], [0, 0, -3]], atol=1e-6)


def test_a_quaternion_far_too_long_is_refused_with_its_length(tmp_path: Path):
    path = with_quaternion(tmp_path / "a.nii", 1.5, 0, 0, nibabel.Nifti1Image)
    with pytest.raises(FlapsamError, match=r"its quaternion has the length 1\.5, not 1; repair"):
        read_image(path)
