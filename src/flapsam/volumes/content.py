"""What a file is by its first bytes, for sentences about files that are not what their names say."""

import gzip
import zlib
from pathlib import Path

from flapsam.volumes.dicom_file import begins_as_dicom

LOOK = 600
"""Number of bytes that tell what a file is."""
GZIP = b"\x1f\x8b"
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"BZh", "compressed with bzip2", "unpack it"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "unpack it"),
    (b"\x89HDF", "an HDF5 file, such as MINC", "convert it to .nii.gz"),
    (b"CDF", "a NetCDF file, such as MINC", "convert it to .nii.gz"),
    (b"\x93NUMPY", "a NumPy array", "save it as .nii.gz, with its affine"),
    (b"\x89PNG", "a PNG picture", "convert the volume from its source"),
    (b"\xff\xd8\xff", "a JPEG picture", "convert the volume from its source"),
    (b"GIF8", "a GIF picture", "convert the volume from its source"),
    (b"II*\0", "a TIFF picture", "convert it to .nii.gz"),
    (b"MM\0*", "a TIFF picture", "convert it to .nii.gz"),
    (b"%PDF", "a PDF document", "replace it"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "run git lfs pull"),
    (b"/annex/objects", "a pointer of git-annex in place of the file", "run git annex get"),
    (b"NRRD", "an NRRD file", "name it .nrrd"),
    (b"ObjectType = Image", "a MetaImage file", "name it .mha"),
    (b"{", "JSON text", "replace it"),
)


def what_it_is(path: Path) -> tuple[str, str] | None:
    """What a file is, and what to do about it, or None if its first bytes do not tell.

    Args:
        path: a file that could not be read as what its name says.
    """
    try:
        with path.open("rb") as file:
            start = file.read(LOOK)
    except OSError:
        return None
    if not start.startswith(GZIP):
        return _what(start)
    try:
        with gzip.open(path) as file:
            inner = file.read(LOOK)
    except EOFError:
        return "compressed data that end too early", "copy or export it again"
    except (OSError, zlib.error):
        return "damaged compressed data", "copy or export it again"
    if inner.startswith(GZIP):
        return "compressed twice with gzip", "unpack it once"
    found = _what(inner)
    return (f"{found[0]}, compressed with gzip", found[1]) if found else ("compressed with gzip", "replace it")


def _what(start: bytes) -> tuple[str, str] | None:
    if not start:
        return "empty", "copy or export it again"
    if not start.strip(b"\0") and len(start) == LOOK:
        return "zeros alone", "copy it again"
    if start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0"):
        if b"ni" in (start[344:346], start[4:6]):
            return "the header of a NIfTI pair (.hdr and .img)", "convert both to one .nii.gz"
        return "a NIfTI file", "name it .nii or .nii.gz"
    if start[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and len(start) >= 348:
        return "an Analyze header", "convert it to .nii.gz"
    if start[257:262] == b"ustar":
        return "a TAR archive", "unpack it"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for begin, what, advice in _BEGINNINGS:
        if text.startswith(begin):
            return what, advice
    if text[:1] == b"<":
        lower = text.lower()
        if b"<html" in lower or lower.startswith(b"<!doctype html"):
            return "a web page (HTML)", "download the file itself"
        return "XML text", "replace it"
    if begins_as_dicom(start):
        return "a DICOM file", "name it .dcm"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in start):
        return "text", "replace it"
    return None


def misnamed(path: Path, expected: str) -> str:
    """The sentence about a file that cannot be read as what its name says.

    Args:
        path: the file.
        expected: the format that its name says, such as ``NIfTI``.
    """
    found = what_it_is(path)
    if found is None or found[0].split()[1:2] == [expected]:
        return f"{path}: not a readable {expected} file, because its header is damaged or cut off; copy or export it again"
    what, advice = found
    return f"{path}: not a readable {expected} file, but {what}; {advice}"
