"""Files whose name says something else than their content: read where that is safe, and else named for what they are."""

import bz2
import gzip
import io
import logging
import lzma
import tarfile
import warnings
import zipfile
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from flapsam.base.errors import FlapsamError
from flapsam.volumes import (
    case_name,
    is_dicom,
    is_image,
    is_nifti,
    legend_of,
    read_image,
    read_label,
    sort_files,
    write_labels,
)
from tests.helpers.dicom import save_series
from tests.helpers.sites import load
from tests.volumes.test_headers import ARRAY

AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])
NIFTI = nibabel.Nifti1Image(ARRAY, AFFINE).to_bytes()
TWO = nibabel.Nifti2Image(ARRAY, AFFINE).to_bytes()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.nii", NIFTI)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("a.nii")
        member.size = len(NIFTI)
        archive.addfile(member, io.BytesIO(NIFTI))
    return stream.getvalue()


READ = {
    "plain.nii.gz": NIFTI,
    "packed.nii": gzip.compress(NIFTI),
    "plain two.nii.gz": TWO,
    "packed two.nii": gzip.compress(TWO),
    "two streams.nii.gz": gzip.compress(NIFTI[:400]) + gzip.compress(NIFTI[400:]),
    "CAPITALS.NII.GZ": gzip.compress(NIFTI),
    "Mixed.Nii": NIFTI,
    "plain capitals.nii.GZ": NIFTI,
}


@pytest.mark.parametrize("name", READ)
def test_nifti_is_read_compressed_or_not_whatever_its_name_says(name: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(READ[name])
    assert is_nifti(path)
    assert is_image(path)
    assert case_name(path) == name.split(".")[0]
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, ARRAY)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    np.testing.assert_array_equal(read_label(path).array, ARRAY)
    (written,) = write_labels((ARRAY % 2).astype(np.uint8), path, volume.affine, tmp_path / "out", ())
    np.testing.assert_array_equal(load(written).affine, AFFINE)


@pytest.mark.parametrize("end", [".NRRD", ".Nrrd", ".MHA", ".Mha"])
def test_other_formats_may_have_suffixes_in_capitals(end: str, tmp_path: Path):
    path = tmp_path / f"a{end.lower()}"
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY.transpose()), str(path))
    path = path.rename(tmp_path / f"CASE{end}")
    assert is_image(path)
    assert case_name(path) == "CASE"
    np.testing.assert_array_equal(read_image(path).array, ARRAY)
    (written,) = write_labels((ARRAY % 2).astype(np.uint8), path, np.eye(4), tmp_path / "out", ())
    np.testing.assert_array_equal(read_label(written).array, ARRAY % 2)


NAMED = {
    "twice.nii.gz": (gzip.compress(gzip.compress(NIFTI)), "compressed twice with gzip; unpack it once"),
    "page.nii.gz": (
        b"<!DOCTYPE html><html><body>Please log in</body></html>" * 20,
        r"a web page \(HTML\); download the file",
    ),
    "page.nii": (b"\n <html lang=en>", r"a web page \(HTML\)"),
    "packed page.nii.gz": (gzip.compress(b"<html></html>"), r"a web page \(HTML\), compressed with gzip"),
    "denied.nii.gz": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML text"),
    "error.nii.gz": (b'{"error": "not found"}', "JSON text"),
    "pointer.nii.gz": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "a pointer of Git LFS .* git lfs pull",
    ),
    "annex.nii.gz": (b"/annex/objects/MD5E-s1--00.nii.gz", "a pointer of git-annex"),
    "empty.nii": (b"", "empty; copy or export it again"),
    "zeros.nii": (bytes(5000), "zeros alone"),
    "text.nii.gz": (b"hello\n", "text; replace it"),
    "archive.nii.gz": (zipped(), "a ZIP archive; unpack it"),
    "tar.nii.gz": (gzip.compress(tarred()), "a TAR archive, compressed with gzip; unpack it"),
    "bz.nii.gz": (bz2.compress(NIFTI), "compressed with bzip2"),
    "xz.nii.gz": (lzma.compress(NIFTI), "compressed with xz"),
    "early.nii.gz": (gzip.compress(NIFTI)[:40], "compressed data that end too early"),
    "damaged.nii.gz": (gzip.compress(NIFTI)[:12] + bytes(range(256)), "damaged compressed data"),
    "pair.nii": (NIFTI[:344] + b"ni1\0", r"the header of a NIfTI pair"),
    "analyze.nii": (NIFTI[:344] + bytes(200), "an Analyze header; convert it"),
    "picture.nii.gz": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
    "minc.nii": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file, such as MINC"),
    "half.nii": (NIFTI[:200], "its header is damaged or cut off; copy or export it again"),
    "nrrd.nii.gz": (b"NRRD0005\ntype: short\n", "an NRRD file; name it .nrrd"),
    "dicom.nii": (bytes(128) + b"DICM" + bytes(500), "a DICOM file; name it .dcm"),
    "nifti.nrrd": (NIFTI, "not a readable NRRD file, but a NIfTI file; name it .nii or .nii.gz"),
    "packed.nrrd": (gzip.compress(NIFTI), "not a readable NRRD file, but a NIfTI file, compressed with gzip"),
    "page.mha": (b"<html></html>", r"not a readable MetaImage file, but a web page \(HTML\)"),
    "empty.mhd": (b"", "not a readable MetaImage file, but empty"),
    "nifti.bak": (NIFTI, "a NIfTI file; name it .nii or .nii.gz"),
    "scan.zip": (zipped(), "a ZIP archive; unpack it"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_file_is_named_for_what_it_is(name: str, tmp_path: Path):
    content, sentence = NAMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlapsamError, match=rf"{name}: .*{sentence}") as caught:
        read_image(tmp_path / name)
    assert "truncated?" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"), [(b"<html></html>", "a web page"), (b"", "empty"), (gzip.compress(NIFTI), "NIfTI")]
)
def test_a_dicom_file_is_named_for_what_it_is(content: bytes, what: str, tmp_path: Path):
    (tmp_path / "a.dcm").write_bytes(content)
    assert is_dicom(tmp_path / "a.dcm")
    (series,) = sort_files([tmp_path / "a.dcm"]).series
    with pytest.raises(FlapsamError, match=rf"a\.dcm: not a readable DICOM file, but .*{what}"):
        read_image(series)


def test_no_library_says_anything_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
):
    """Each of these files makes its library complain on the terminal, without naming the file."""
    raw = bytearray(NIFTI)
    raw[76:80] = np.float32(0.7).tobytes()
    raw[252:254] = np.int16(1).tobytes()
    (tmp_path / "qfac.nii").write_bytes(raw)
    two = nibabel.Nifti2Image(ARRAY, AFFINE)
    nibabel.save(two, tmp_path / "two.nii")
    nrrd.write(str(tmp_path / "a.nrrd"), ARRAY, {"spacings": [1.0, 1.0, 3.0]})
    folder = save_series(
        tmp_path / "dicom", ARRAY, np.eye(4), change=lambda header, _: header.add_new(0x00281050, "DS", ["40", "40"])
    )
    sources = [
        tmp_path / "qfac.nii",
        tmp_path / "two.nii",
        tmp_path / "a.nrrd",
        *sort_files(sorted(folder.iterdir())).series,
    ]
    for index, source in enumerate(sources):
        volume = read_image(source)
        write_labels((ARRAY % 2).astype(np.uint8), source, volume.affine, tmp_path / f"out{index}", legend_of(["kidney"]))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not [str(warning.message) for warning in recwarn]
    assert logging.getLogger("nibabel.global").level < logging.CRITICAL
    assert warnings.filters
