"""Limits that the operating system holds the reading process to, relative to the size of the image that it reads."""

import os
import signal
from pathlib import Path

SLACK = 256 * 2**20
"""Bytes of memory that reading an image may take beyond a multiple of its size."""
TIMES = 8
"""Multiple of an image's size in bytes that reading it may take, because libraries convert and scale voxels."""
SECONDS = 1
"""Seconds of computing that reading an image may take beyond those for its size."""
SPEED = 2**18
"""Bytes per second that reading an image reaches at least."""


def limit(size: int) -> None:
    """Limit this process's memory and computing time, counted from now. The system ends it when the time is over.

    Memory that processes share, in which the voxels are passed on, does not count.

    Args:
        size: size in bytes of what is read, which is the file at first, and the voxels once the header was checked.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS + size / SPEED)
    usage = Path("/proc/self/statm")
    if usage.exists():
        import resource

        data = int(usage.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        _set(resource.RLIMIT_DATA, data + SLACK + TIMES * size)


def without_time_limit() -> None:
    """Let this process compute again as long as it likes, since it has read its image."""
    signal.setitimer(signal.ITIMER_PROF, 0)


def without_core_dumps() -> None:
    """Let this process write no memory image when it dies, since that would hold a patient's voxels.

    Its files may be as large as the system permits, since voxels are passed on in a file.
    """
    import resource

    _set(resource.RLIMIT_CORE, 0)
    _set(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)


def _set(kind: int, value: int) -> None:
    """Set a limit of this process, as far as its own limits permit."""
    import resource

    hard = resource.getrlimit(kind)[1]
    unlimited = resource.RLIM_INFINITY
    known = [bound for bound in (value, hard) if bound != unlimited]
    resource.setrlimit(kind, (min(known, default=unlimited), hard))
