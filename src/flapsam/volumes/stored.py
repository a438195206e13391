"""Voxels that a file stores one after the other, plain or compressed, as NRRD and MetaImage files do.

ITK returns whatever is in memory where a compressed MetaImage file is damaged, and does not check NRRD's checksums.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**20
"""Number of bytes that are unpacked at once. They fit into a processor's cache."""
EITHER = 47
"""Number by which zlib recognises its own format and gzip."""


@dataclass(frozen=True)
class Stored:
    """Where a file stores its voxels."""

    file: Path
    offset: int
    """Position of the first byte."""
    size: int
    """Size of a number in bytes."""
    big_endian: bool
    compressed: bool

    def parts(self, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[NDArray]:
        """Read the voxels, as parts of an array that follow each other along its last axis.

        Args:
            shape: shape of the array, whose first axis varies fastest.
            dtype: type of the numbers, in this machine's order of bytes.

        Raises:
            EOFError: the file ends too early.
            ValueError: there are more voxels.
            zlib.error: the compressed voxels are damaged.
            OSError: the file cannot be read.
        """
        of_file = dtype.newbyteorder(">" if self.big_endian else "<")
        slab = math.prod(shape[:-1]) * dtype.itemsize
        step = max(CHUNK // slab, 1)
        counts = [min(step, shape[-1] - start) for start in range(0, shape[-1], step)]
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            sizes = [slab * count for count in counts]
            pieces = _inflated(opened, sizes) if self.compressed else map(opened.read, sizes)
            for count, size, piece in zip(counts, sizes, pieces, strict=True):
                if len(piece) < size:
                    raise EOFError
                yield np.frombuffer(piece, of_file).reshape((*shape[:-1], count), order="F")


def _inflated(opened: BinaryIO, sizes: list[int]) -> Iterator[bytearray]:
    """Yield pieces of the sizes from compressed data. After the last piece, the data must end, and their checksum fit."""
    unpack = zlib.decompressobj(EITHER)
    packed = b""

    def more(limit: int) -> bytes:
        """Up to ``limit`` further bytes, or none at the end."""
        nonlocal unpack, packed
        while True:
            packed = packed or opened.read(2**20)
            if unpack.eof:
                # Programs that compress in parallel write several streams.
                if packed[:2] != b"\x1f\x8b":
                    return b""
                unpack = zlib.decompressobj(EITHER)
            if not packed:
                raise EOFError
            piece = unpack.decompress(packed, limit)
            packed = unpack.unused_data if unpack.eof else unpack.unconsumed_tail
            if piece:
                return piece

    for size in sizes:
        whole = bytearray()
        while len(whole) < size:
            piece = more(size - len(whole))
            if not piece:
                raise EOFError
            whole += piece
        yield whole
    if more(1):
        raise ValueError
