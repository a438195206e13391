"""DICOM files as they really are: without preamble or file meta, or with file meta that contradict the data set.

PS3.10 says how a file begins, and PS3.5 how its elements are encoded. Archives and anonymisers that change the transfer
syntax without encoding the data set again write files whose file meta are wrong.
"""

import io
import mmap
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
PIXELS = b"\xe0\x7f\x10\x00"
"""Tag of the pixel data, in little endian."""
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN)
"""Transfer syntaxes without compression."""
PREFIX = b"DICM"
VRS = {
    *(b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"OB", b"OD", b"OF", b"OL", b"OV"),
    *(b"OW", b"PN", b"SH", b"SL", b"SQ", b"SS", b"ST", b"SV", b"TM", b"UC", b"UI", b"UL", b"UN", b"UR", b"US", b"UT", b"UV"),
}
LONG = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UN", b"UC", b"UR", b"UT", b"SV", b"UV")
"""Types of values whose length takes four bytes."""
META = 2**12
"""Largest number of bytes of the file meta."""
FIRST = 0x70
"""Largest number of the element that a data set begins with."""


def begins_as_dicom(start: bytes) -> bool:
    """Whether a file with these first 140 bytes is DICOM, with or without a preamble."""
    if start[128:132] == PREFIX or start[:4] == PREFIX:
        return True
    if len(start) < 8 or _encoding(start) is None:
        return False
    order = "<" if start[1] == 0 else ">"
    group, element = struct.unpack_from(f"{order}HH", start)
    length = struct.unpack_from("<I", start, 4)[0]
    return (
        group in (2, 8) and element <= FIRST and (start[4:6] in VRS or (order == "<" and length % 2 == 0 and length < 256))
    )


@contextmanager
def opened(file: Path, *, pixels: bool = True) -> Iterator[BinaryIO]:
    """Open a DICOM file. One that contradicts itself is passed on with sound file meta, and a deflated one inflated.

    Args:
        file: the file.
        pixels: whether the pixel data matter, so that it matters whether they are compressed.

    Raises:
        OSError: the file cannot be read.
        zlib.error: the file is deflated and damaged.
    """
    with file.open("rb") as stream:
        start = stream.read(132 + META)
        if not begins_as_dicom(start):
            stream.seek(0)
            yield stream
            return
        at, said = _data_set(start)
        actual = _encoding(start[at : at + 8])
        compressed = said not in (None, DEFLATED, *NATIVE)
        if actual and compressed and (actual != EXPLICIT or (pixels and not _has_fragments(stream))):
            compressed = False
        elif said == DEFLATED:
            # pydicom finds pixel data by their place in the file, which a deflated data set does not have.
            stream.seek(at)
            yield io.BytesIO(_with_meta(EXPLICIT, zlib.decompress(stream.read(), wbits=-zlib.MAX_WBITS)))
            return
        elif start[128:132] == PREFIX and said and (compressed or actual in (None, said)):
            stream.seek(0)
            yield stream
            return
        stream.seek(at)
        yield io.BytesIO(_with_meta(said if compressed or not actual else actual, stream.read()))


def _has_fragments(stream: BinaryIO) -> bool:
    """Whether pixel data of a file are in fragments, as compressed ones are, or it has none."""
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        at = whole.find(PIXELS)
        found = False
        while at >= 0:
            element = whole[at : at + 12]
            if element[4:8] in (b"OB\0\0", b"OW\0\0"):
                if element[8:] == b"\xff\xff\xff\xff":
                    return True
                found = True
            at = whole.find(PIXELS, at + 4)
    return not found


def _data_set(start: bytes) -> tuple[int, str | None]:
    """Position of the data set, and the transfer syntax that the file meta before it name."""
    at = 132 if start[128:132] == PREFIX else 4 if start[:4] == PREFIX else 0
    syntax = None
    while start[at : at + 2] == b"\x02\x00" and at + 12 <= len(start):
        element, kind = start[at + 2 : at + 4], start[at + 4 : at + 6]
        if kind in LONG:
            begin, length = at + 12, struct.unpack_from("<I", start, at + 8)[0]
        elif kind in VRS:
            begin, length = at + 8, struct.unpack_from("<H", start, at + 6)[0]
        else:
            begin, length = at + 8, struct.unpack_from("<I", start, at + 4)[0]
        if element == b"\x10\x00":
            syntax = start[begin : begin + length].decode("ascii", "replace").strip("\0 ") or None
        at = begin + length
    return at, syntax


def _encoding(data_set: bytes) -> str | None:
    """The transfer syntax, apart from compression, of a data set that begins with these bytes. None if they are none."""
    if len(data_set) < 8:
        return None
    explicit = data_set[4:6] in VRS
    if data_set[1] == 0 and data_set[0]:
        return EXPLICIT if explicit else IMPLICIT
    if data_set[0] == 0 and data_set[1] and explicit:
        return BIG_ENDIAN
    return None


def _with_meta(syntax: str | None, data_set: bytes) -> bytes:
    name = (syntax or IMPLICIT).encode()
    name += b"\0" * (len(name) % 2)
    element = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(name)) + name
    return bytes(128) + PREFIX + b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(element)) + element + data_set
