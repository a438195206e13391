"""Reading DICOM series and writing segmentations, checked against SimpleITK and highdicom."""

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.uid import UID, JPEGLSLossless, RLELossless

from flapsam.base.errors import FlapsamError
from flapsam.volumes import Volume, is_dicom, legend_of, read_image, sort_files, write_labels
from flapsam.volumes.itk import affine_of
from tests.helpers.dicom import changed, save_enhanced, save_series

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LEGEND = legend_of(["kidney", "part of it"])


def synthetic_ct(shape: tuple[int, int, int] = (12, 10, 6)) -> Volume:
    """A volume in Hounsfield units on an oblique, anisotropic grid, with its slices ordered from feet to head."""
    c, s = np.cos(0.2), np.sin(0.2)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([-0.7, -0.8, 2.5])
    affine[:3, 3] = 5, 6, 7
    return Volume(np.random.default_rng(0).integers(-1024, 3000, size=shape).astype(np.int16), affine)


def read_folder(folder: Path) -> Volume:
    (series,) = sort_files(sorted(path for path in folder.iterdir() if is_dicom(path))).series
    return read_image(series)


def read_with_sitk(folder: Path) -> tuple[NDArray, NDArray]:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    return sitk.GetArrayFromImage(image).transpose(), affine_of(image)


@pytest.mark.parametrize("order", [None, [3, 1, 5, 0, 2, 4]])
def test_a_series_in_any_file_order_is_read_as_by_simpleitk(order: list[int] | None, tmp_path: Path):
    expected = synthetic_ct()
    save_series(tmp_path, expected.array, expected.affine, order=order)
    volume = read_folder(tmp_path)
    array, affine = read_with_sitk(tmp_path)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-9)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-9)
    assert volume.array.dtype == np.int16


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70"])
def test_compressed_series_are_read(syntax: str, tmp_path: Path):
    expected = synthetic_ct()
    save_series(tmp_path, expected.array, expected.affine)
    for path in tmp_path.iterdir():
        if UID(syntax) in (RLELossless, JPEGLSLossless):
            changed(path, lambda header: header.compress(UID(syntax)))
        else:
            compress_with_gdcm(path, syntax)
    assert {pydicom.dcmread(path).file_meta.TransferSyntaxUID for path in tmp_path.iterdir()} == {syntax}
    np.testing.assert_array_equal(read_folder(tmp_path).array, expected.array)


def compress_with_gdcm(path: Path, syntax: str) -> None:
    """Compress a file as JPEG 2000 or lossless JPEG, which pydicom does not write."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize("order", [range(6), [5, 4, 3, 2, 1, 0], [4, 2, 0, 1, 5, 3]])
def test_all_slices_may_be_in_one_file(order: list[int], tmp_path: Path):
    expected = synthetic_ct()
    save_enhanced(tmp_path / "one.dcm", expected.array, expected.affine, list(order))
    volume = read_folder(tmp_path)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-9)


def test_a_tilted_gantry_shears_the_affine(tmp_path: Path):
    expected = synthetic_ct()
    affine = expected.affine.copy()
    affine[:3, 2] += 0.9 * affine[:3, 1]
    save_series(tmp_path, expected.array, affine)
    np.testing.assert_allclose(read_folder(tmp_path).affine, affine, atol=1e-9)


def test_every_slice_may_have_its_own_rescale_slope(tmp_path: Path):
    expected = synthetic_ct()

    def change(header: pydicom.Dataset, index: int) -> None:
        header.RescaleSlope = 0.5 + index / 8

    save_series(tmp_path, expected.array, expected.affine, change=change)
    volume = read_folder(tmp_path)
    stored = expected.array.astype(np.float64) + 1024
    np.testing.assert_allclose(volume.array, stored * (0.5 + np.arange(6) / 8) - 1024, rtol=1e-6)
    assert volume.array.dtype == np.float32


def test_series_are_separated_and_reports_are_left_out(tmp_path: Path):
    expected = synthetic_ct()
    save_series(tmp_path, expected.array, expected.affine, series="first")
    save_series(tmp_path, expected.array[..., :4], expected.affine, series="second")
    report = save_series(tmp_path / "report", expected.array[..., :1], expected.affine, series="third")
    (file,) = report.iterdir()
    changed(file, lambda header: setattr(header, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.88.11"))
    file.rename(tmp_path / "report.dcm")
    all_series = sort_files(sorted(path for path in tmp_path.iterdir() if path.is_file())).series
    assert sorted((series.description, len(series.files)) for series in all_series) == [("first", 6), ("second", 4)]


def test_dicom_files_are_recognised(tmp_path: Path):
    save_series(tmp_path / "a", synthetic_ct().array, synthetic_ct().affine)
    file = next((tmp_path / "a").iterdir())
    for name in ("IM000001", "1.2.840.99.1", "slice.ima", "IMG.1.v2", "notes.txt", "scan.nii"):
        (tmp_path / name).write_bytes(file.read_bytes())
        assert is_dicom(tmp_path / name)
    for name in ("DICOMDIR", ".hidden.dcm"):
        (tmp_path / name).write_bytes(file.read_bytes())
        assert not is_dicom(tmp_path / name)
    (tmp_path / "README").write_text("nothing")
    assert not is_dicom(tmp_path / "README")


@pytest.mark.parametrize("whole_file", [False, True])
def test_every_frame_of_a_segmentation_lies_at_its_position(whole_file: bool, tmp_path: Path):
    image = synthetic_ct()
    if whole_file:
        save_enhanced(tmp_path / "in" / "one.dcm", image.array, image.affine, [4, 2, 0, 1, 5, 3])
    else:
        save_series(tmp_path / "in", image.array, image.affine, order=[3, 1, 5, 0, 2, 4])
    (series,) = sort_files(sorted((tmp_path / "in").iterdir())).series
    volume = read_image(series)
    labels = np.zeros(volume.array.shape, np.uint8)
    labels[2:7, 3:8, 1:4] = 1
    labels[3:5, 4, 2] = 2
    nifti, path = write_labels(labels, series, volume.affine, tmp_path / "out", LEGEND)
    np.testing.assert_array_equal(read_image(nifti).array, labels)

    segmentation = highdicom.seg.segread(path)
    described = [segmentation.get_segment_description(number) for number in (1, 2)]
    assert [(d.segment_label, d.segmented_property_type.scheme_designator) for d in described] == [
        ("kidney", "SCT"),
        ("part of it", "99FLAPSAM"),
    ]
    # Three slices contain the first class and one the second. Empty frames are left out.
    assert segmentation.NumberOfFrames == 4
    assert segmentation.PatientID == "7"
    sources = {pydicom.dcmread(file).SOPInstanceUID for file in series.files}
    assert {uid for *_, uid in segmentation.get_source_image_uids()} == sources
    # Every frame has the position of the slice that it was made from.
    restored = np.zeros_like(labels)
    to_voxels = np.linalg.inv(LPS @ volume.affine)
    raw = pydicom.dcmread(path)
    for groups, frame in zip(raw.PerFrameFunctionalGroupsSequence, raw.pixel_array, strict=True):
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        k = int(np.rint(to_voxels @ [*map(float, position), 1])[2])
        value = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        restored[:, :, k][frame.T > 0] = value
    np.testing.assert_array_equal(restored, labels)


def test_an_empty_label_map_is_written_as_a_segmentation(tmp_path: Path):
    image = synthetic_ct()
    save_series(tmp_path / "in", image.array, image.affine)
    (series,) = sort_files(sorted((tmp_path / "in").iterdir())).series
    _, path = write_labels(np.zeros((12, 10, 6), np.uint8), series, image.affine, tmp_path / "out", LEGEND)
    assert not pydicom.dcmread(path).pixel_array.any()


def test_a_series_without_a_study_cannot_be_the_source_of_a_segmentation(tmp_path: Path):
    image = synthetic_ct()
    save_series(tmp_path / "in", image.array, image.affine, change=lambda header, _: delattr(header, "StudyInstanceUID"))
    (series,) = sort_files(sorted((tmp_path / "in").iterdir())).series
    with pytest.raises(FlapsamError, match=r"cannot be the source of a DICOM segmentation .*StudyInstanceUID"):
        write_labels(np.zeros((12, 10, 6), np.uint8), series, image.affine, tmp_path / "out", LEGEND)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
