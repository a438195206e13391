"""Memory for voxels, which is checked before it is allocated, because a header may claim any size."""

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Literal

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from flapsam.base.errors import FlapsamError

IN_MEMORY = 512 * 2**20
"""Size in bytes above which an array is mapped from a file. The system keeps the parts in use in memory."""
DEFLATE = 1032
"""Highest compression ratio of zlib's format."""


def check_claim(path: Path, claimed: int, *, compressed: bool, stored: int | None = None) -> None:
    """Check that a file is large enough for the voxels that its header promises.

    Args:
        path: the file.
        claimed: number of bytes of all voxels, uncompressed.
        compressed: whether the file stores the voxels with zlib's compression.
        stored: number of bytes that the file stores the voxels in. By default, the size of the file.

    Raises:
        FlapsamError: the file is too small.
    """
    size = path.stat().st_size if stored is None else stored
    if claimed > size * (DEFLATE if compressed else 1):
        raise FlapsamError(
            f"{path}: its header promises {_readable(claimed)} of voxels, but the file has only {_readable(size)}, so it is "
            "truncated or its header is wrong; copy or export it again"
        )


def check_memory(path: Path, needed: int) -> None:
    """Check that enough memory is free for the voxels of a file.

    Args:
        path: the file.
        needed: number of bytes.

    Raises:
        FlapsamError: less memory is free.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise FlapsamError(
            f"{path}: its voxels take {_readable(needed)} of memory, but only {_readable(free)} are free; "
            "use a machine with more memory"
        )


def room(what: Path | str, shape: tuple[int, ...], dtype: DTypeLike, order: Literal["C", "F"] = "F") -> NDArray:
    """Allocate an array for voxels, without initialising it.

    An array above ``IN_MEMORY`` is mapped from an unnamed file in the folder for temporary files. The file disappears
    with the array.

    Args:
        what: name of the image for the error message.
        shape: shape of the array.
        dtype: type of its numbers.
        order: memory order of the axes: the first varies fastest, as in most image files (``F``), or the last (``C``).

    Raises:
        FlapsamError: the disk has too little space.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype, order=order)
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):
                # Otherwise a full disk would kill the process when a voxel is written.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise no_room(what, size) from error
        return np.memmap(file, dtype, "r+", shape=shape, order=order)


def shared(what: object, size: int) -> IO[bytes]:
    """Make a file without a name for voxels that pass from one process to another.

    Up to ``IN_MEMORY``, it is in memory, else in the folder for temporary files. It is empty at first.

    Args:
        what: the image for the error message.
        size: size in bytes that the file will have.

    Raises:
        FlapsamError: the disk has too little space.
    """
    try:
        if size <= IN_MEMORY and hasattr(os, "memfd_create"):
            file: IO[bytes] = os.fdopen(os.memfd_create("voxels"), "r+b", buffering=0)
        else:
            if size > shutil.disk_usage(tempfile.gettempdir()).free:
                raise no_room(what, size)
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it is returned open)
    except OSError as error:
        raise no_room(what, size) from error
    return file


def no_room(what: object, size: int) -> FlapsamError:
    """The error for voxels of ``size`` bytes that do not fit onto the disk.

    Args:
        what: the image for the message.
        size: size of the voxels in bytes.
    """
    return FlapsamError(
        f"{what}: its voxels take {_readable(size)}, more than {tempfile.gettempdir()} has room for; "
        "set TMPDIR to a folder on a larger disk"
    )


def _readable(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**16 else f"{size} bytes"
