"""Limits that the operating system holds the reading process to, relative to the size of the image that it reads."""

import os
from pathlib import Path

SLACK = 256 * 2**20
"""Bytes of memory that reading an image may take beyond a multiple of its size."""
TIMES = 8
"""Multiple of an image's size in bytes that reading it may take, because libraries convert and scale voxels."""
SECONDS = 60
"""Seconds of computing that reading an image may take beyond those for its size."""
SPEED = 2**20
"""Bytes per second that reading an image reaches at least."""


def limit(size: int) -> None:
    """Limit this process's memory and computing time, counted from now. Systems without such limits are left as they are.

    Memory that processes share, in which the voxels are passed on, does not count.

    Args:
        size: size in bytes of what is read, which is the file at first, and the voxels once the header was checked.
    """
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + SECONDS + size / SPEED
    limits = {resource.RLIMIT_CPU: int(seconds)}
    usage = Path("/proc/self/statm")
    if usage.exists():
        limits[resource.RLIMIT_DATA] = int(usage.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE") + SLACK + TIMES * size
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def without_core_dumps() -> None:
    """Let this process write no memory image when it dies, since that would hold a patient's voxels.

    Its files may be as large as the system permits, since voxels are passed on in a file.
    """
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
