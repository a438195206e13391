"""Room for voxels, asked for before it is taken: a header may claim anything."""

import math
import os
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from flapsam.base.errors import FlapsamError

IN_MEMORY = 512 * 2**20
"""Bytes of an array above which it lies in a file, from which the system keeps in memory what is in use."""
DEFLATE = 1032
"""How many times smaller zlib's format makes a file at best."""


def check_claim(path: Path, claimed: int, *, compressed: bool) -> None:
    """See whether a file can hold what its header says.

    Args:
        path: the file.
        claimed: bytes of all voxels, uncompressed.
        compressed: whether they are deflated in the file.

    Raises:
        FlapsamError: it is too small.
    """
    size = path.stat().st_size
    if claimed > size * (DEFLATE if compressed else 1):
        raise FlapsamError(
            f"{path}: its header promises {_readable(claimed)} of voxels, the file has {_readable(size)}; "
            "it is truncated or its header wrong"
        )


def check_memory(path: Path, needed: int) -> None:
    """See whether so many bytes can be had at once.

    Raises:
        FlapsamError: not so many are free.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise FlapsamError(f"{path}: its voxels take {_readable(needed)} of memory, {_readable(free)} are free")


def room(what: Path | str, shape: tuple[int, ...], dtype: DTypeLike, order: Literal["C", "F"] = "F") -> NDArray:
    """An array for voxels; zeros, or whatever was there.

    Above ``IN_MEMORY`` it is mapped from a file without a name in the folder for temporary files, gone with the array.

    Args:
        what: the image whose voxels they are, for the error.
        shape: of the array.
        dtype: of its numbers.
        order: which axis runs fastest: the first as in most image files (``F``), or the last.

    Raises:
        FlapsamError: there is not so much room on the disk.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype, order=order)
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):
                # Without it, a disk that is full would end the process when a voxel is written.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise FlapsamError(
                f"{what}: its voxels take {_readable(size)}, more than {tempfile.gettempdir()} has room for; "
                "set TMPDIR to a folder on a larger disk"
            ) from error
        return np.memmap(file, dtype, "r+", shape=shape, order=order)


def _readable(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**16 else f"{size} bytes"
