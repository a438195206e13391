"""Images that would crash, hang or fill a reader that trusts them."""

import gzip
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from tests.helpers.dicom import changed, save_series
from tests.helpers.sites import SHAPE, save

ARRAY = np.random.default_rng(0).integers(-100, 100, size=SHAPE).astype(np.int16)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


def itk(path: Path, *changes: tuple[bytes, bytes], compressed: bool = False) -> None:
    """Save an NRRD or MetaImage file, with words of its header replaced."""
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY.T), str(path), useCompression=compressed)
    content = path.read_bytes()
    for old, new in changes:
        assert old in content
        content = content.replace(old, new, 1)
    path.write_bytes(content)


def detached(path: Path, old: bytes, data: Callable[[Path], None]) -> None:
    """Save a header whose voxels are in the file ``trap``, which ``data`` makes."""
    itk(path, (old, b"trap"))
    data(path.with_name("trap"))


def nifti(path: Path, place: int, packed: bytes, *, keep: float = 1, extra: int = 0) -> None:
    """Save a NIfTI file, with bytes of its header replaced, only a part of it kept, or zeros added."""
    plain = path.with_name("plain.nii")
    save(ARRAY, plain)
    content = bytearray(plain.read_bytes())
    plain.unlink()
    content[place : place + len(packed)] = packed
    content = content[: int(keep * len(content))] + bytes(extra)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def dicom(path: Path, syntax: str, field: str = "", value: object = None) -> None:
    """Save one compressed slice, and change a field of its header afterwards."""
    folder = save_series(path.parent, ARRAY[..., :1], AFFINE)
    (file,) = folder.iterdir()
    file.rename(path)
    changed(path, lambda header: header.compress(syntax))
    if field:
        changed(path, lambda header: setattr(header, field, value))


def dicom_with_other_size(path: Path) -> None:
    """Save a slice whose code says that it has 65,535 rows and columns."""
    dicom(path, JPEGLSLossless)
    content = path.read_bytes()
    place = content.index(b"\xff\xf7") + 5
    path.write_bytes(content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :])


def dicom_bomb(path: Path) -> None:
    """Save a deflated file that inflates to 1 GiB of zeros."""
    dicom(path, RLELossless, "PatientComments", "x")
    changed(path, lambda header: setattr(header.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))
    content = path.read_bytes()
    start = content.index(b"1.2.840.10008.1.2.1.99") + 22
    squeeze = zlib.compressobj(1, wbits=-15)
    # After a full flush, the block can be repeated.
    block = squeeze.compress(bytes(2**24)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    end = 132 + 12 + struct.unpack_from("<I", content, 140)[0]
    path.write_bytes(content[: max(start, end)] + 64 * block + squeeze.flush())


def bind(path: Path) -> None:
    """Put a socket at a path, which must be short."""
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


DEADLY: dict[str, tuple[Callable[[Path], object], str]] = {
    "long_value.nrrd": (
        lambda p: itk(p, (b"type: short", b"type: " + b"x" * 5000)),
        "line 4 is longer than 1000 characters",
    ),
    "long_line.nrrd": (lambda p: itk(p, (b"type: short", b"x" * 5000 + b"\ntype: short")), "line 4 has no field"),
    "axes.mha": (lambda p: itk(p, (b"NDims = 3", b"NDims = 65535")), "NDims '65535' is not from 1 to 4"),
    "no_axes.mha": (lambda p: itk(p, (b"NDims = 3", b"NDims = -1")), "NDims '-1' is not from 1 to 4"),
    "shifted.mha": (lambda p: itk(p, (b"LOCAL\n", b"LOCAL\n\n"), compressed=True), "the file is truncated or damaged"),
    "promise.mha": (
        lambda p: itk(p, (b"DataSize = ", b"DataSize = 99999999"), compressed=True),
        "it promises more bytes than the file has",
    ),
    "pipe.nhdr": (lambda p: detached(p, b"pipe.raw", os.mkfifo), "the file with its voxels, trap, is missing"),
    "pipe.mhd": (lambda p: detached(p, b"pipe.raw", os.mkfifo), "the file with its voxels, trap, is missing"),
    "zeros.mhd": (lambda p: detached(p, b"zeros.raw", to_zeros), "the file with its voxels, trap, is missing"),
    "list.mhd": (lambda p: itk(p, (b"list.raw", b"LIST")), "'LIST' is not a valid value of the field 'ElementDataFile'"),
    "elsewhere.nhdr": (lambda p: itk(p, (b"elsewhere.raw", b"/etc/passwd")), "must be in a file beside it"),
    "pipe.nii.gz": (os.mkfifo, "this is a pipe, a socket or a device"),
    "socket.mha": (bind, "this is a pipe, a socket or a device"),
    "bomb.nii.gz": (lambda p: nifti(p, 108, struct.pack("<f", 1e9), extra=2**24), "its header places the voxels at byte"),
    "liar.nii.gz": (lambda p: nifti(p, 40, struct.pack("<4h", 3, 30000, 30000, 30000)), "its header promises"),
    "nowhere.nii": (lambda p: nifti(p, 280, struct.pack("<f", np.nan)), "the affine is singular"),
    "cut.nii.gz": (lambda p: nifti(p, 0, b"", keep=0.5), "the file is truncated or damaged"),
    "frames.dcm": (lambda p: dicom(p, RLELossless, "NumberOfFrames", 2**31 - 1), "its header promises"),
    "rows.dcm": (lambda p: dicom(p, RLELossless, "Rows", 65535), "its header promises"),
    "code.dcm": (dicom_with_other_size, "its pixel data have shape (65535, 65535)"),
    "deflated.dcm": (dicom_bomb, "deflated.dcm: "),
}
"""File name → function that makes it, and a part of the sentence about it. Each goes into a folder of its own."""
