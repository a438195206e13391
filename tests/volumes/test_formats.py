"""Every image format: a label map has exactly the geometry of its image, and names its classes."""

import itertools
import json
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from flapsam.base.errors import FlapsamError
from flapsam.volumes import FORMATS, Volume, case_name, is_image, itk_snap, legend_of, read_image, read_label, write_labels
from flapsam.volumes.allocation import check_claim, check_memory, room
from flapsam.volumes.nifti import open_nifti
from tests.helpers.sites import load
from tests.volumes.test_volumes import ORIENTATIONS, anatomy, stored_as

LEGEND = legend_of(["kidney", "tumour"])
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def save_as(volume: Volume, path: Path) -> Path:
    """Save an image without flapsam: NIfTI with nibabel, and every other format with SimpleITK."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), path)
        return path
    image = sitk.GetImageFromArray(volume.array.transpose())
    affine = LPS @ volume.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


ENDS = [(name, end) for name, form in FORMATS.items() for end in form.suffixes]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize(("name", "end"), ENDS)
def test_images_and_label_maps_round_trip_with_their_geometry(name: str, end: str, codes: str, tmp_path: Path):
    expected = stored_as(codes, anatomy())
    path = save_as(expected, tmp_path / f"case.1{end}")
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)
    labels = (expected.array % 3).astype(np.uint8)
    (written,) = write_labels(labels, path, volume.affine, tmp_path / "out" / case_name(path), LEGEND)
    assert written.name == f"case.1{FORMATS[name].written}"
    reread = read_label(written)
    np.testing.assert_array_equal(reread.array, labels)
    np.testing.assert_array_equal(reread.affine, volume.affine)


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("end", [".nii.gz", ".nrrd", ".mha"])
def test_other_libraries_read_exactly_the_geometry_of_the_image(codes: str, end: str, tmp_path: Path):
    stored = stored_as(codes, anatomy())
    path = save_as(stored, tmp_path / f"image{end}")
    (written,) = write_labels(np.zeros(stored.array.shape, np.uint8), path, stored.affine, tmp_path / "label", LEGEND)
    if end == ".nii.gz":
        np.testing.assert_array_equal(load(written).affine, load(path).affine)
        return
    before, after = sitk.ReadImage(str(path)), sitk.ReadImage(str(written))
    assert after.GetOrigin() == before.GetOrigin()
    assert after.GetSpacing() == before.GetSpacing()
    assert after.GetDirection() == before.GetDirection()


@pytest.mark.parametrize(("name", "end"), ENDS)
def test_modalities_may_be_in_separate_files_of_every_format(name: str, end: str, tmp_path: Path):
    first, second = anatomy(), Volume(anatomy().array + 7, anatomy().affine)
    paths = [save_as(volume, tmp_path / f"case_000{index}{end}") for index, volume in enumerate((first, second))]
    volume = read_image(*paths)
    assert volume.modalities == 2
    np.testing.assert_array_equal(volume.array, np.stack([first.array, second.array], axis=-1))
    moved = save_as(Volume(first.array, first.affine + np.eye(4)), tmp_path / f"moved{end}")
    with pytest.raises(FlapsamError, match=r"moved.* it does not lie in the same place as .*case_0000"):
        read_image(paths[0], moved)
    if name == "NIfTI":
        both = save_as(volume, tmp_path / f"both{end}")
        with pytest.raises(FlapsamError, match=r"both.* a 3-D volume is needed, but this file has 4 dimensions"):
            read_image(both, paths[0])


@pytest.mark.parametrize("scale", [(1, 0), (0.5, 3)])
@pytest.mark.parametrize("kind", ["<i2", ">i2", "<u2", "<i4", "<f4", "<f8"])
def test_nifti_read_in_chunks_matches_nibabel(kind: str, scale: tuple, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("flapsam.volumes.nifti.CHUNK", 500)
    array = np.random.default_rng(0).integers(0, 3000, size=(7, 6, 11)).astype(kind)
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.set_data_dtype(np.dtype(kind))
    image.header.set_slope_inter(*scale)
    nibabel.save(image, tmp_path / "a.nii.gz")
    expected = np.asanyarray(load(tmp_path / "a.nii.gz").dataobj)
    opened = open_nifti(tmp_path / "a.nii.gz")
    with (tmp_path / "voxels").open("w+b", buffering=0) as file:
        opened.write(file, "a")
    actual = np.fromfile(tmp_path / "voxels", opened.dtype).reshape(opened.shape, order="F")
    np.testing.assert_array_equal(actual, expected if expected.dtype.kind in "iu" else expected.astype(np.float32))
    assert actual.dtype == (np.float32 if scale != (1, 0) or "f" in kind else np.dtype(kind).newbyteorder("="))


def test_nifti_label_maps_store_names_and_colours_in_the_header(tmp_path: Path):
    path = save_as(anatomy(), tmp_path / "image.nii.gz")
    (written,) = write_labels(np.ones((4, 5, 3), np.uint8), path, np.eye(4), tmp_path / "label", LEGEND)
    (extension,) = load(written).header.extensions
    assert json.loads(extension.get_content()) == {
        "labels": {"1": {"name": "kidney", "colour": "#e69f00"}, "2": {"name": "tumour", "colour": "#56b4e9"}}
    }


@pytest.mark.parametrize("end", [".nrrd", ".mha"])
def test_label_maps_have_the_fields_of_3d_slicer(end: str, tmp_path: Path):
    path = save_as(anatomy(), tmp_path / f"image{end}")
    (written,) = write_labels(np.ones((4, 5, 3), np.uint8), path, np.eye(4), tmp_path / "label", LEGEND)
    image = sitk.ReadImage(str(written))
    fields = {name: image.GetMetaData(name) for name in image.GetMetaDataKeys() if name.startswith("Segment1")}
    assert fields == {
        "Segment1_ID": "Segment_2",
        "Segment1_Name": "tumour",
        "Segment1_Color": "0.337255 0.705882 0.913725",
        "Segment1_LabelValue": "2",
        "Segment1_Layer": "0",
        "Segment1_Extent": "0 3 0 4 0 2",
    }
    if end == ".nrrd":
        assert nrrd.read_header(str(written))["Segment0_Name"] == "kidney"


def test_descriptions_have_the_format_of_itk_snap():
    assert itk_snap(LEGEND).splitlines() == [
        '0 0 0 0 0 0 0 "background"',
        '1 230 159 0 1 1 1 "kidney"',
        '2 86 180 233 1 1 1 "tumour"',
    ]


def test_image_files_are_recognised_by_name():
    assert [case_name(Path(f"a/case.1{end}")) for end in (".nii", ".nii.gz", ".seg.nrrd", ".nhdr", ".mha")] == ["case.1"] * 5
    assert is_image(Path("a.mhd"))
    assert not is_image(Path("._a.mha"))
    assert not is_image(Path("a.raw"))


def test_an_unknown_format_is_refused(tmp_path: Path):
    with pytest.raises(
        FlapsamError, match=r"a.png: not an image format that flapsam reads; convert it to .nii.gz, .nii, .nrrd"
    ):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(("claimed", "compressed"), itertools.product([99, 100, 101, 103_200, 103_201], [False, True]))
def test_a_header_may_not_claim_more_than_the_file_can_contain(claimed: int, compressed: bool, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    if claimed <= (103_200 if compressed else 100):
        check_claim(path, claimed, compressed=compressed)
    else:
        with pytest.raises(FlapsamError, match="its header promises"):
            check_claim(path, claimed, compressed=compressed)


def test_a_volume_larger_than_memory_is_refused(tmp_path: Path):
    with pytest.raises(FlapsamError, match=r"a: its voxels take 953,674,316.4 MiB of memory"):
        check_memory(Path("a"), 10**15)


def test_large_arrays_are_mapped_to_a_file_that_is_already_deleted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("flapsam.volumes.allocation.IN_MEMORY", 100)
    assert not isinstance(room("a", (10, 10), np.uint8), np.memmap)
    array = room("a", (3, 4, 10), np.int16)
    assert isinstance(array, np.memmap)
    assert array.flags.f_contiguous
    array[...] = np.arange(120).reshape(3, 4, 10)
    np.testing.assert_array_equal(array, np.arange(120).reshape(3, 4, 10))
    assert list(tmp_path.iterdir()) == []


def test_an_array_larger_than_the_disk_is_refused(monkeypatch, tmp_path: Path):
    with pytest.raises(FlapsamError, match=r"a: its voxels take .* more than .* has room for; set TMPDIR"):
        room("a", (10**6, 10**6, 10**4), np.uint8)
