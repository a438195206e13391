"""Writing files so that a reader never sees an incomplete one, and reading only what is a file.

Images, updates and label maps belong to patients. All files and folders are therefore made for their owner alone, whatever
the umask is. The permissions of folders that exist already are left as they are.
"""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from flapsam.base.errors import FlapsamError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Errors of a file system without locks. Work there continues without a lock."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk without space."""
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk or folder without permission."""
TEXT_BYTES = 64 * 2**20
"""Largest size in bytes of a text file that is read at once."""


def check_file(path: Path) -> None:
    """Check that there is a file at ``path``. A pipe would block its reader for ever, and a device may never end.

    Raises:
        FlapsamError: there is nothing, or something that is not a file.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FlapsamError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise FlapsamError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise FlapsamError(f"{path}: this is {kind}, but a file is needed; replace it")


def exists(path: Path) -> bool:
    """Whether there is something at ``path``. Names that no file can have do not raise, unlike with ``Path.exists``."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def size_of(*paths: Path) -> int:
    """Size of the files that exist, in bytes."""
    return sum(path.stat().st_size for path in paths if exists(path))


def read_bytes(path: Path) -> bytes:
    """Read a file that is text, in whatever encoding.

    Raises:
        FlapsamError: there is something at ``path`` that is not a file, or the file is far too large.
        OSError: the file is missing or cannot be read.
    """
    if exists(path):
        check_file(path)
        if path.stat().st_size > TEXT_BYTES:
            raise FlapsamError(f"{path}: the file is far too large for text; replace it")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        FlapsamError: as in ``read_bytes``.
        OSError: the file is missing or cannot be read.
        UnicodeDecodeError: it is not text in UTF-8.
    """
    return read_bytes(path).decode().replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. When the block ends without an error, sync it and rename it to ``path``.

    The temporary name keeps the suffixes, because image libraries choose the format by them.

    Raises:
        FlapsamError: the folder cannot be created or written to, or the disk is full.
    """
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=f"-{path.name}", dir=path.parent)
    except OSError as error:
        raise FlapsamError(f"{path.parent}: cannot write here ({error.strerror}); choose another output folder") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # The file has this mode already, unless a library has replaced it.
        temporary.chmod(0o600)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise FlapsamError(f"{path}: cannot be written ({reason})") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, too, so that a power cut does not bring back an older file."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, completely or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, completely or not at all."""
    write_bytes(path, text.encode())


def make_folder(path: Path, mode: int = 0o700) -> Path:
    """Create the folder ``path`` with its parents, and return it.

    Args:
        path: the folder.
        mode: permissions of the folders that do not exist yet.

    Raises:
        FlapsamError: the folder cannot be created.
    """
    try:
        for folder in reversed((path, *path.parents)):
            if not folder.is_dir():
                folder.mkdir(mode, exist_ok=True)
    except OSError as error:
        raise FlapsamError(f"{path}: cannot create this folder ({error.strerror}); choose another output folder") from error
    return path


def check_writable(folder: Path) -> None:
    """Create ``folder`` and write a file in it as a test, before long work begins.

    Raises:
        FlapsamError: the folder cannot be created or written to.
    """
    probe = folder / ".writable"
    write_bytes(probe, b"")
    probe.unlink()


class InUseError(FlapsamError):
    """Another process is using a folder."""


def alone(path: Path, *, wait: bool = True) -> IO[bytes]:
    """Lock a file until the returned file object is closed or the process ends.

    Args:
        path: the file to lock.
        wait: whether to wait while another process holds the lock.

    Raises:
        InUseError: another process holds the lock and ``wait`` is False.
    """
    import fcntl

    make_folder(path.parent)
    file = open(path, "wb", opener=private)  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise InUseError(f"{path.parent}: another process is using this folder; stop that process first") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return file


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock from ``alone`` on a file.

    Processes on other machines count if the file system shares their locks.
    """
    import fcntl

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def private(path: str, flags: int) -> int:
    """An opener for ``open``, which creates files for their owner alone."""
    return os.open(path, flags, 0o600)


def disk_problem(error: OSError) -> str | None:
    """A sentence about a full or read-only disk, or None if the error has another reason."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in FULL:
        return f"{place}cannot be written ({error.strerror}); free some space or choose another folder"
    if error.errno in FORBIDDEN:
        return f"{place}cannot be used ({error.strerror}); check its permissions or choose another folder"
    return None


def _reason(error: Exception) -> str | None:
    """The operating system's reason why a file cannot be written, or None if the error has another reason."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # Safetensors, which is written in Rust, names the number of the error only.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number and not isinstance(error, FlapsamError) else None
