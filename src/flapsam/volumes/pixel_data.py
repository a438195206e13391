"""Checks of what a DICOM file promises about its pixel data, before memory is taken for them (PS3.5 A.4)."""

import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from flapsam.base.errors import FlapsamError
from flapsam.volumes.allocation import check_claim
from flapsam.volumes.dicom_file import opened

if TYPE_CHECKING:
    from pydicom import Dataset

PIXEL_DATA = struct.pack("<HH", 0x7FE0, 0x0010)
BITS = (1, 8, 16, 32, 64)
SIZED = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG and JPEG-LS whose segment holds the size of the image."""
SEGMENTS = 100
"""Largest number of segments before the one with the size."""


def check_pixel_data(file: Path, header: "Dataset", frames: int, start: int) -> None:
    """Check the number, size and places of a file's frames.

    Args:
        file: the file.
        header: its header.
        frames: number of frames that the header promises.
        start: position of the pixel data's element in the file.

    Raises:
        FlapsamError: the image is empty or coloured, or the file does not hold what its header promises.
    """
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise FlapsamError(f"{file}: voxels are colours; a volume with one number per voxel is needed")
    rows, columns, bits = int(header.Rows), int(header.Columns), int(header.BitsAllocated)
    if min(rows, columns, frames) < 1:
        raise FlapsamError(
            f"{file}: the image is empty, with {rows} rows, {columns} columns and {frames} frames; export it again"
        )
    if bits not in BITS or not 1 <= int(header.get("BitsStored", bits)) <= bits:
        raise FlapsamError(f"{file}: its header promises {bits} bits per voxel, so it is damaged; export it again")
    syntax = header.file_meta.TransferSyntaxUID
    claimed = max(rows * columns * frames * bits // 8, 1)
    with opened(file) as stream:
        check_claim(file, claimed, compressed=syntax.is_compressed, stored=stream.seek(0, io.SEEK_END))
        stream.seek(start)
        if syntax.is_compressed:
            _check_fragments(file, stream, header, frames, (rows, columns))
        elif _begins_fragments(stream.read(12)):
            raise FlapsamError(f"{file}: its pixel data are compressed, but its header does not say how; export it again")


def _begins_fragments(element: bytes) -> bool:
    """Whether an element holds fragments, whose length is not given, as compressed pixel data are stored."""
    return element[:4] == PIXEL_DATA and b"\xff\xff\xff\xff" in (element[4:8], element[8:12])


def _check_fragments(file: Path, stream: BinaryIO, header: "Dataset", frames: int, size: tuple[int, int]) -> None:
    from pydicom.encaps import parse_basic_offsets, parse_fragments

    element = stream.read(12)
    if element[:4] != PIXEL_DATA:
        return
    table = parse_basic_offsets(stream)  # type: ignore[arg-type]
    first = stream.tell()
    count, places = parse_fragments(stream)  # type: ignore[arg-type]
    end = file.stat().st_size
    if count < frames:
        raise FlapsamError(f"{file}: its header promises {frames} frames, but the file has {count}; export it again")
    offsets, lengths = (_numbers(header, f"ExtendedOffsetTable{part}") for part in ("", "Lengths"))
    if any(len(numbers) not in (0, frames) for numbers in (table, offsets, lengths)) or len(offsets) != len(lengths):
        raise FlapsamError(f"{file}: the table of its frames has another length than its {frames} frames; export it again")
    beyond = [place for place in table if first + place + 8 > end]
    beyond += [place for place, length in zip(offsets, lengths, strict=True) if first + place + 8 + length > end]
    if beyond:
        raise FlapsamError(f"{file}: the table of its frames leads beyond the end of the file; is it truncated?")
    for place in places:
        stream.seek(place + 8)
        coded = _coded_size(stream)
        if coded not in (None, size):
            raise FlapsamError(f"{file}: its pixel data have shape {coded}, but its header says {size}; export it again")


def _numbers(header: "Dataset", field: str) -> tuple[int, ...]:
    value = header.get(field) or b""
    return struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8])


def _coded_size(stream: BinaryIO) -> tuple[int, int] | None:
    """Rows and columns in the code of a JPEG, JPEG-LS or JPEG 2000 image, or None if it begins with something else."""
    begin = stream.read(2)
    if begin == b"\xff\x4f":
        siz = stream.read(22)
        if len(siz) < 22 or siz[:2] != b"\xff\x51":
            return None
        columns, rows, left, top = struct.unpack(">4I", siz[6:22])
        return rows - top, columns - left
    if begin != b"\xff\xd8":
        return None
    for _ in range(SEGMENTS):
        segment = stream.read(4)
        if len(segment) < 4 or segment[0] != 0xFF:
            return None
        if segment[1] in SIZED:
            frame = stream.read(5)
            return struct.unpack(">HH", frame[1:]) if len(frame) == 5 else None
        stream.seek(max(int.from_bytes(segment[2:], "big") - 2, 0), 1)
    return None
