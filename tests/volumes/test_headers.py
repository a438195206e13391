"""Headers of NRRD and MetaImage files: what other software writes is read, and what could harm a reader is refused."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from flapsam.base.errors import FlapsamError
from flapsam.volumes import read_image

ARRAY = np.arange(4 * 3 * 2, dtype=np.int16).reshape((4, 3, 2), order="F")
NRRD = ["NRRD0005", "type: short", "dimension: 3", "sizes: 4 3 2", "encoding: raw", "endian: little"]
META = ["ObjectType = Image", "NDims = 3", "DimSize = 4 3 2", "ElementType = MET_SHORT"]
RAW = ARRAY.tobytes("F")


def write(path: Path, lines: list[str], data: bytes = RAW, *, end: str = "\n") -> Path:
    """Write a header and its voxels into one file."""
    path.write_bytes("".join(line + end for line in lines).encode() + data)
    return path


def changed(lines: list[str], *changes: str) -> list[str]:
    """The lines with others in place of those with the same field, or added at the end. An empty value removes the line."""
    result = list(lines)
    for change in changes:
        field = change.split(":")[0] if ": " in change else change.split(" =")[0]
        same = [index for index, line in enumerate(result) if line.startswith((f"{field}: ", f"{field} ="))]
        if same:
            result[same[0]] = change
        else:
            result.append(change)
    return result


SLICER = ["space: left-posterior-superior", "space directions: (1,0,0) (0,1,0) (0,0,3)", "space origin: (0,0,0)"]
GOOD_NRRD = {
    "plain": (NRRD, RAW),
    "crlf": (NRRD, RAW),
    "comments and long keys": ([*NRRD, "# comment" * 9000, f"Segmentation_ConversionParameters:={'x' * 70_000}"], RAW),
    "slicer": ([*NRRD, *SLICER, "kinds: domain domain domain", "measurement frame: (1,0,0) (0,1,0) (0,0,1)"], RAW),
    "words with spaces": ([*NRRD, 'labels: "a b" "" "c"', 'units: "mm" "mm" "mm"', "content: a b c: d"], RAW),
    "spacings": ([*NRRD, "spacings: 1 2 3", "centers: cell cell cell", "axis mins: 0 0 0", "thicknesses: nan nan 1"], RAW),
    "big endian": (changed(NRRD, "endian: big"), ARRAY.astype(">i2").tobytes("F")),
    "gzip": (changed(NRRD, "encoding: gzip"), gzip.compress(RAW)),
    "two streams": (changed(NRRD, "encoding: gz"), gzip.compress(RAW[:10]) + gzip.compress(RAW[10:])),
    "text": (changed(NRRD, "encoding: ascii"), " ".join(map(str, ARRAY.ravel("F"))).encode()),
    "skip": ([*NRRD, "byte skip: 5"], b"12345" + RAW),
    "skip to the end": ([*NRRD, "byte skip: -1"], b"12345" + RAW),
}
GOOD_META = {
    "plain": (META, RAW),
    "crlf": (META, RAW),
    "other keys": ([*META, "0008|0060 = CT", f"Segment0_Name = {'x' * 10_000}", "Comment = a = b"], RAW),
    "big endian": ([*META, "BinaryDataByteOrderMSB = True"], ARRAY.astype(">i2").tobytes("F")),
    "zlib": ([*META, "CompressedData = True", f"CompressedDataSize = {len(zlib.compress(RAW))}"], zlib.compress(RAW)),
    "text": ([*META, "BinaryData = False"], " ".join(map(str, ARRAY.ravel("F"))).encode() + b"\n"),
}


def assert_read_as_by_itk(path: Path) -> None:
    array = read_image(path).array
    np.testing.assert_array_equal(array, ARRAY)
    np.testing.assert_array_equal(array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T)


@pytest.mark.parametrize("name", GOOD_NRRD)
def test_what_others_write_as_nrrd_is_read(name: str, tmp_path: Path):
    lines, data = GOOD_NRRD[name]
    path = write(tmp_path / "a.nrrd", [*lines, ""], data, end="\r\n" if name == "crlf" else "\n")
    assert_read_as_by_itk(path)


@pytest.mark.parametrize("name", GOOD_META)
def test_what_others_write_as_metaimage_is_read(name: str, tmp_path: Path):
    lines, data = GOOD_META[name]
    path = write(tmp_path / "a.mha", [*lines, "ElementDataFile = LOCAL"], data, end="\r\n" if name == "crlf" else "\n")
    assert_read_as_by_itk(path)


@pytest.mark.parametrize("skipped", [0, 7, -1])
def test_voxels_in_a_file_of_their_own_are_read(skipped: int, tmp_path: Path):
    (tmp_path / "a b.raw").write_bytes(bytes(7 if skipped else 0) + RAW)
    field = [f"byte skip: {skipped}"] if skipped else []
    path = write(tmp_path / "a.nhdr", [*NRRD, *field, "data file: a b.raw"], b"")
    np.testing.assert_array_equal(read_image(path).array, ARRAY)
    (tmp_path / "ab.raw").write_bytes((tmp_path / "a b.raw").read_bytes())
    path = write(tmp_path / "a.mhd", [*META, f"HeaderSize = {skipped}", "ElementDataFile = ab.raw"], b"")
    np.testing.assert_array_equal(read_image(path).array, ARRAY)


FLIPPED = bytes([*zlib.compress(RAW)[:-1], zlib.compress(RAW)[-1] ^ 1])
BAD_NRRD: dict[str, tuple[list[str], bytes, str]] = {
    "sixteen axes": (changed(NRRD, "dimension: 16"), RAW, "dimension '16' is not from 1 to 4"),
    "two sizes": (changed(NRRD, "sizes: 4 3"), RAW, "'4 3' is not a valid value of the field 'sizes'"),
    "no size": (changed(NRRD, "sizes: 4 3 0"), RAW, "field 'sizes'"),
    "digits": (changed(NRRD, "sizes: 4 3 ٢"), RAW, "field 'sizes'"),
    "blocks": (changed(NRRD, "type: block"), RAW, "field 'type'"),
    "bzip2": (changed(NRRD, "encoding: bzip2"), RAW, "field 'encoding'"),
    "twice": ([*NRRD, "sizes: 4 3 2"], RAW, "the field 'sizes' is there twice"),
    "no order of bytes": (NRRD[:-1], RAW, "the field 'endian' is missing"),
    "vectors": ([*NRRD, "space directions: (1,0) (0,1) (0,0)"], RAW, "field 'spacedirections'"),
    "time": ([*NRRD, "space: left-posterior-superior-time"], RAW, "field 'space'"),
    "infinite": ([*NRRD, "spacings: 1 1 inf"], RAW, "field 'spacings'"),
    "control": ([*NRRD, "content: a\x00b"], RAW, "line 7 is not text"),
    "endless": ([*NRRD, *["# comment"] * 200_000], RAW, "it is longer than 1048576 bytes"),
    "short": (NRRD, RAW[:-1], "its header promises"),
    "more voxels": (changed(NRRD, "encoding: gzip"), gzip.compress(RAW + b"1"), "the file is truncated or damaged"),
    "fewer voxels": (changed(NRRD, "encoding: gzip"), gzip.compress(RAW[1:]), "the file is truncated or damaged"),
    "checksum": (changed(NRRD, "encoding: gzip"), gzip.compress(RAW)[:-8] + bytes(8), "the file is truncated or damaged"),
}
BAD_META: dict[str, tuple[list[str], bytes, str]] = {
    "five axes": (changed(META, "NDims = 5"), RAW, "NDims '5' is not from 1 to 4"),
    "another object": (changed(META, "ObjectType = Tube"), RAW, "field 'ObjectType'"),
    "text as type": (changed(META, "ElementType = MET_STRING"), RAW, "field 'ElementType'"),
    "twice": ([*META, "NDims = 3"], RAW, "the field 'NDims' is there twice"),
    "colon": (["ObjectType : Image", *META[1:]], RAW, "not a readable MetaImage file"),
    "two orders": ([*META, "ElementByteOrderMSB = True", "BinaryDataByteOrderMSB = False"], RAW, "contradicts itself"),
    "channels": ([*META, "ElementNumberOfChannels = 1000"], RAW, "field 'ElementNumberOfChannels'"),
    "skip": ([*META, "HeaderSize = 2"], RAW, "only for plain voxels in another file"),
    "short": (META, RAW[:-1], "its header promises"),
    "checksum": ([*META, "CompressedData = True"], FLIPPED, "the file is truncated or damaged"),
}


@pytest.mark.parametrize("name", BAD_NRRD)
def test_a_damaged_nrrd_file_is_refused(name: str, tmp_path: Path):
    lines, data, message = BAD_NRRD[name]
    with pytest.raises(FlapsamError, match=rf"a\.nrrd: .*{message}"):
        read_image(write(tmp_path / "a.nrrd", [*lines, ""], data))


@pytest.mark.parametrize("name", BAD_META)
def test_a_damaged_metaimage_file_is_refused(name: str, tmp_path: Path):
    lines, data, message = BAD_META[name]
    with pytest.raises(FlapsamError, match=rf"a\.mha: .*{message}"):
        read_image(write(tmp_path / "a.mha", [*lines, "ElementDataFile = LOCAL"], data))


@pytest.mark.parametrize("name", ["../a.raw", "/dev/zero", "LIST", "a%d.raw 1 3 1", "link", "folder", ""])
def test_voxels_elsewhere_are_refused(name: str, tmp_path: Path):
    folder = tmp_path / "in"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "a.raw").write_bytes(RAW)
    (folder / "link").symlink_to(tmp_path / "a.raw")
    for path in (
        write(folder / "a.nhdr", [*NRRD, f"data file: {name}"], b""),
        write(folder / "a.mhd", [*META, f"ElementDataFile = {name}"], b""),
    ):
        with pytest.raises(FlapsamError, match=rf"{path.name}: its header is damaged"):
            read_image(path)
