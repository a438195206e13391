"""DICOM as scanners, archives and anonymisers write it. Pixels are compared with what was encoded, and with SimpleITK."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from flapsam.base.errors import FlapsamError
from flapsam.volumes import is_dicom, legend_of, read_image, source_at, write_labels
from flapsam.volumes.dicom import sort_files
from flapsam.volumes.left_out import sentences
from tests.helpers.dicom import changed, save_enhanced, save_series
from tests.volumes.test_dicom import read_folder, synthetic_ct

CT = synthetic_ct()
PREAMBLE = bytes(128) + b"DICM"


def encoded(header: Dataset, syntax: str) -> bytes:
    """The data set, encoded as ``syntax`` says."""
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    pixels = np.frombuffer(header.PixelData, np.uint16)
    header.PixelData = pixels.byteswap().tobytes() if syntax == ExplicitVRBigEndian else pixels.tobytes()
    header["PixelData"].VR = "OW"
    write_dataset(buffer, header)
    return buffer.getvalue()


def meta(header: pydicom.FileDataset, syntax: str) -> bytes:
    header.file_meta.TransferSyntaxUID = UID(syntax)
    stream = DicomBytesIO()
    write_file_meta_info(stream, header.file_meta, enforce_standard=True)
    return stream.getvalue()


LITTLE, IMPLICIT, BIG = ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian
Rebuild = Callable[[pydicom.FileDataset], bytes]


def said(real: str, claimed: str) -> Rebuild:
    return lambda header: PREAMBLE + meta(header, claimed) + encoded(header, real)


FILES: dict[str, Rebuild] = {
    "explicit under implicit": said(LITTLE, IMPLICIT),
    "implicit under explicit": said(IMPLICIT, LITTLE),
    "big endian under explicit": said(BIG, LITTLE),
    "big endian under implicit": said(BIG, IMPLICIT),
    "explicit under big endian": said(LITTLE, BIG),
    "implicit under big endian": said(IMPLICIT, BIG),
    "explicit under JPEG-LS": said(LITTLE, JPEGLSLossless),
    "explicit under RLE": said(LITTLE, RLELossless),
    "implicit under JPEG": said(IMPLICIT, JPEGBaseline8Bit),
    "implicit, right": said(IMPLICIT, IMPLICIT),
    "big endian, right": said(BIG, BIG),
    "no meta, explicit": lambda header: PREAMBLE + encoded(header, LITTLE),
    "no meta, implicit": lambda header: PREAMBLE + encoded(header, IMPLICIT),
    "no preamble, explicit": lambda header: meta(header, LITTLE) + encoded(header, LITTLE),
    "no preamble, implicit": lambda header: meta(header, IMPLICIT) + encoded(header, IMPLICIT),
    "prefix without preamble": lambda header: b"DICM" + meta(header, LITTLE) + encoded(header, LITTLE),
    "data set alone, explicit": lambda header: encoded(header, LITTLE),
    "data set alone, implicit": lambda header: encoded(header, IMPLICIT),
    "data set alone, big endian": lambda header: encoded(header, BIG),
}


def rebuild(folder: Path, build: Rebuild, end: str = ".dcm") -> Path:
    """Write a series whose files ``build`` makes."""
    for path in sorted(save_series(folder, CT.array, CT.affine).iterdir()):
        data = build(pydicom.dcmread(path))
        path.unlink()
        path.with_suffix(end).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_series_is_read_whatever_its_file_meta_say(name: str, tmp_path: Path):
    folder = rebuild(tmp_path / "in", FILES[name], end="")
    assert all(is_dicom(path) for path in folder.iterdir())
    volume = read_folder(folder)
    np.testing.assert_array_equal(volume.array, CT.array)
    np.testing.assert_allclose(volume.affine, CT.affine, atol=1e-9)
    (series,) = sort_files(sorted(folder.iterdir())).series
    labels = (CT.array > 1000).astype(np.uint8)
    _, segmentation = write_labels(labels, series, volume.affine, tmp_path / "out", legend_of(["kidney"]))
    assert pydicom.dcmread(segmentation).pixel_array.sum() == labels.sum()


def test_a_deflated_series_is_read(tmp_path: Path):
    save_series(tmp_path, CT.array, CT.affine)
    for path in tmp_path.iterdir():
        changed(path, lambda header: setattr(header.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))
    np.testing.assert_array_equal(read_folder(tmp_path).array, CT.array)


@pytest.mark.parametrize("claimed", [LITTLE, None])
def test_compressed_pixels_without_a_codec_are_refused(claimed: str | None, tmp_path: Path):
    for path in save_series(tmp_path, CT.array, CT.affine).iterdir():
        changed(path, lambda header: header.compress(RLELossless))
        whole = path.read_bytes()
        at = whole.index(b"\x08\x00\x16\x00")
        path.write_bytes(PREAMBLE + (meta(pydicom.dcmread(path), claimed) if claimed else b"") + whole[at:])
    with pytest.raises(
        FlapsamError, match=r"its pixel data are compressed, but its header does not say how; export it again"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "slope"), [(8, 1), (12, 1), (16, 1), (16, 2.5)])
def test_monochrome1_is_read_as_by_itk(bits: int, slope: float, signed: bool, tmp_path: Path):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    kind = np.int16 if signed else np.uint16
    stored = np.random.default_rng(0).integers(low, high, size=(2, 5, 6), endpoint=True)

    def change(header: Dataset, index: int) -> None:
        header.PhotometricInterpretation, header.PixelRepresentation = "MONOCHROME1", int(signed)
        header.BitsStored, header.HighBit, header.RescaleSlope = bits, bits - 1, slope
        header.PixelData = stored[index].astype(kind).tobytes()

    save_series(tmp_path, np.zeros((6, 5, 2)), np.eye(4), change=change)
    array = read_folder(tmp_path).array
    np.testing.assert_allclose(array, ((low + high - stored) * slope - 1024).transpose(2, 1, 0))
    # ITK's library refuses signed numbers with another number of bits.
    if not signed or bits in (8, 16):
        files = sorted(map(str, tmp_path.iterdir()))
        np.testing.assert_allclose(array, sitk.GetArrayFromImage(sitk.ReadImage(files)).transpose())


def copies(folder: Path, count: int) -> Path:
    for path in sorted(save_series(folder, CT.array, CT.affine).iterdir())[:count]:
        shutil.copy(path, path.with_name(f"{path.stem}(1).dcm"))
    return folder


@pytest.mark.parametrize("count", [1, 3, 6])
def test_copies_of_files_are_dropped_and_named(count: int, tmp_path: Path):
    folder = copies(tmp_path / "in", count)
    np.testing.assert_array_equal(read_folder(folder).array, CT.array)
    found = sort_files(sorted(folder.iterdir()))
    assert [len(series.files) for series in found.series] == [6]
    (sentence,) = sentences(found.left_out)
    assert "left out made_up_0000(1).dcm" in sentence
    assert "(copies of other files of the series)" in sentence
    assert ("and 1 more" in sentence) == (count == 6)


def test_copies_that_differ_are_named(tmp_path: Path):
    copies(tmp_path, 1)
    changed(tmp_path / "made_up_0000(1).dcm", lambda header: setattr(header, "PatientID", "8"))
    with pytest.raises(FlapsamError, match=r"made_up_0000(\(1\))?.dcm and made_up_0000(\(1\))?.dcm are the same slice"):
        read_folder(tmp_path)


def test_slices_of_one_instance_uid_are_no_copies(tmp_path: Path):
    """An anonymiser that gives all instances one UID does not make them copies."""
    save_series(tmp_path, CT.array, CT.affine, change=lambda header, _: setattr(header, "SOPInstanceUID", "1.2.3"))
    np.testing.assert_array_equal(read_folder(tmp_path).array, CT.array)


def test_time_points_are_named(tmp_path: Path):
    save_series(tmp_path, CT.array, CT.affine)
    save_series(tmp_path / "b", CT.array, CT.affine, series="made up")
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / f"b_{path.name}")
    (tmp_path / "b").rmdir()
    with pytest.raises(
        FlapsamError, match=r"6 slices have the same position .* such as (b_)?made_up_0000.dcm and (b_)?made_up_0000"
    ):
        read_folder(tmp_path)


def replaced(header: Dataset, _: int) -> None:
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = UID("2.25.123456789")


def emptied(header: Dataset, _: int) -> None:
    del header.SOPClassUID


@pytest.mark.parametrize("change", [replaced, emptied])
@pytest.mark.parametrize("end", [".dcm", ".v2", "", ".DCM", ".gz", ".txt"])
def test_a_series_is_found_by_its_content(change: Callable, end: str, tmp_path: Path):
    for path in save_series(tmp_path, CT.array, CT.affine, change=change).iterdir():
        path.rename(path.with_suffix(end))
    volume = read_folder(tmp_path)
    np.testing.assert_array_equal(volume.array, CT.array)
    (series,) = sort_files(sorted(tmp_path.iterdir())).series
    labels = np.ones(CT.array.shape, np.uint8)
    _, segmentation = write_labels(labels, series, volume.affine, tmp_path / "out" / "a", legend_of(["kidney"]))
    assert pydicom.dcmread(segmentation).pixel_array.sum() == labels.size


def other(kind: str, modality: str = "OT") -> Callable[[Dataset, int], None]:
    def change(header: Dataset, _: int) -> None:
        header.SOPClassUID, header.Modality = kind, modality

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other("1.2.840.10008.5.1.4.1.1.88.11"), "DICOM, but not an image: Basic Text SR Storage"),
        (other("1.2.840.10008.5.1.4.1.1.66.4"), "DICOM, but not an image: Segmentation Storage"),
        (other("1.2.840.10008.5.1.4.1.1.481.2"), "DICOM, but not an image: RT Dose Storage"),
        (other("2.25.7", "SEG"), "DICOM, but not an image: SEG"),
        (lambda header, _: [replaced(header, _), delattr(header, "Rows")], "DICOM without an image"),
    ],
)
def test_other_objects_are_left_out_with_the_reason(change: Callable, reason: str, tmp_path: Path):
    save_series(tmp_path, CT.array[..., :1], CT.affine, series="other", change=change)
    save_series(tmp_path, CT.array, CT.affine)
    found = sort_files(sorted(tmp_path.iterdir()))
    assert len(found.series) == 1
    assert sentences(found.left_out) == [f"{tmp_path}: left out other_0000.dcm ({reason})"]


def spread(root: Path, split: Callable[[int], str]) -> Path:
    """Write a series whose files lie in the folders that ``split`` names."""
    for index, path in enumerate(sorted(save_series(root / "all", CT.array, CT.affine).iterdir())):
        (root / split(index)).mkdir(exist_ok=True)
        path.rename(root / split(index) / path.name)
    (root / "all").rmdir()
    return root


def all_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "split", [lambda i: f"{i // 3}", lambda i: f"{i % 2}", lambda i: f"{i}", lambda i: "b" if i == 5 else "a"]
)
def test_a_series_may_be_spread_over_folders(split: Callable[[int], str], tmp_path: Path):
    root = spread(tmp_path, split)
    (series,) = sort_files(all_files(root)).series
    assert series.folder == root
    volume = read_image(series)
    np.testing.assert_array_equal(volume.array, CT.array)
    np.testing.assert_allclose(volume.affine, CT.affine, atol=1e-9)
    np.testing.assert_array_equal(read_image(source_at(root)).array, CT.array)


def test_copies_of_a_series_in_other_folders_stay_apart(tmp_path: Path):
    for name in "ab":
        save_series(tmp_path / name, CT.array, CT.affine)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    all_series = sort_files(all_files(tmp_path)).series
    assert [(series.folder.name, len(series.files)) for series in all_series] == [("a", 6), ("b", 6), ("c", 6)]


def test_overlapping_parts_of_a_series_are_one_volume(tmp_path: Path):
    save_series(tmp_path / "a", CT.array, CT.affine)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in [*sorted((tmp_path / "a").iterdir())[4:], *sorted((tmp_path / "b").iterdir())[:2]]:
        path.unlink()
    (series,) = sort_files(all_files(tmp_path)).series
    np.testing.assert_array_equal(read_image(series).array, CT.array)


def test_series_that_share_a_uid_but_make_no_volume_stay_apart(tmp_path: Path):
    """An anonymiser that gives all series one UID does not make them one."""
    far = CT.affine.copy()
    far[2, 3] += 100
    save_series(tmp_path / "a", CT.array, CT.affine)
    save_series(tmp_path / "b", CT.array, far)
    assert len(sort_files(all_files(tmp_path)).series) == 2


def test_series_are_told_by_their_uids(tmp_path: Path):
    """Number and description may be the same, and the description of one series may differ."""
    for name in "ab":
        save_series(
            tmp_path, CT.array, CT.affine, series=name, change=lambda header, _: setattr(header, "SeriesDescription", "T2")
        )
    save_series(
        tmp_path,
        CT.array,
        CT.affine,
        series="c",
        change=lambda header, i: setattr(header, "SeriesDescription", f"slice {i}"),
    )
    assert [len(series.files) for series in sort_files(all_files(tmp_path)).series] == [6, 6, 6]


def test_files_without_a_series_uid_are_one_series(tmp_path: Path):
    save_series(tmp_path, CT.array, CT.affine, change=lambda header, _: delattr(header, "SeriesInstanceUID"))
    np.testing.assert_array_equal(read_folder(tmp_path).array, CT.array)


def test_an_enhanced_file_that_contradicts_itself_is_read(tmp_path: Path):
    path = save_enhanced(tmp_path / "one.dcm", CT.array, CT.affine, [4, 2, 0, 1, 5, 3])
    whole, header = path.read_bytes(), pydicom.dcmread(path)
    path.write_bytes(PREAMBLE + meta(header, IMPLICIT) + whole[whole.index(b"\x08\x00\x08\x00") :])
    volume = read_folder(tmp_path)
    np.testing.assert_array_equal(volume.array, CT.array)


def test_folders_below_a_folder_with_a_series_are_not_mixed_with_it(tmp_path: Path):
    save_series(tmp_path, CT.array, CT.affine)
    save_series(tmp_path / "below", CT.array[..., :4], CT.affine, series="second")
    assert str(source_at(tmp_path)) == str(tmp_path)
    np.testing.assert_array_equal(read_image(source_at(tmp_path)).array, CT.array)
