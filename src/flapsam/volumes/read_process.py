"""The process in which images are read. A damaged image may end it, but never the command.

Images are parsed by code in C, which damaged files can crash, and by libraries that take the memory that a header asks for.
So a small process reads them, one after the other, under limits on memory and time. It passes voxels on in a file without a
name, which both processes map. Threads that read at the same time have a process each.
"""

import atexit
import importlib
import json
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.volumes.allocation import shared
from flapsam.volumes.limits import limit, without_core_dumps, without_time_limit
from flapsam.volumes.opened import Opened
from flapsam.volumes.volume import Volume

Image = TypeVar("Image")

WAIT_SECONDS = 600
"""Seconds that a reading process may be silent, beyond those for the size of the files. It may wait for a slow disk."""
SLOWEST = 2**18
"""Bytes per second that a disk reaches at least."""
LONGEST = 600
"""Number of characters of an error message, which may quote a damaged header."""
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
# nibabel would import pydicom with all its decoders, which takes as long as everything else.
sys.modules["pydicom"] = None
import nibabel
del sys.modules["pydicom"]
from flapsam.volumes.read_process import main
main(int(sys.argv[2]))
"""


class _Died(Exception):  # noqa: N818 (it becomes a sentence)
    """The process ended while it read an image. The message says how."""

    def __init__(self, how: str, *, slow: bool = False) -> None:
        super().__init__(how)
        self.slow = slow


def read_apart(opener: Callable[[Image], Opened], image: Image, size: int) -> Volume:
    """Read an image in a reading process.

    Args:
        opener: function of a module that checks an image's header.
        image: the image that the function takes. As text, it is the image's name.
        size: size of the image's files in bytes.

    Raises:
        FlapsamError: the image cannot be read, or the process died of it.
    """
    reply, array = _ask(opener, image, size, voxels=True)
    return Volume(cast(NDArray, array), np.array(reply["affine"]))


def look_apart(function: Callable[[Image], Any], image: Image, size: int = 0) -> Any:
    """Call a function in a reading process. What it returns is passed on as JSON, an ``Opened`` without its voxels.

    Args:
        function: function of a module.
        image: the image that it takes.
        size: size of the image's files in bytes.

    Raises:
        FlapsamError: as ``read_apart``.
    """
    reply, _ = _ask(function, image, size, voxels=False)
    if "value" in reply:
        return reply["value"]
    return Opened(tuple(reply["shape"]), np.dtype(reply["dtype"]), np.array(reply["affine"]), lambda: iter(()))


_idle: list["_ReadProcess"] = []


def _ask(
    function: Callable[[Image], Any], image: Image, size: int, *, voxels: bool
) -> tuple[dict[str, Any], NDArray | None]:
    folder = ""
    with suppress(OSError):
        # The process has the working directory of its start, but relative paths mean the one of now.
        folder = str(Path.cwd())
    request = pickle.dumps((folder, function, image, size, voxels))
    while True:
        # Threads may run this at the same time, and each takes a process of its own.
        try:
            process, fresh = _idle.pop(), False
        except IndexError:
            process, fresh = _ReadProcess(), True
        try:
            reply, array = process.ask(request, WAIT_SECONDS + size / SLOWEST)
        except _Died as death:
            process.stop()
            # An earlier image may have damaged the process's memory, so this one gets a new process before it is blamed.
            if fresh or death.slow:
                raise FlapsamError(f"{image}: it cannot be read, because {death}; copy or export it again") from death
            continue
        except BaseException:
            process.stop()
            raise
        _idle.append(process)
        if "error" in reply:
            raise FlapsamError(reply["error"])
        return reply, array


class _ReadProcess:
    """A reading process and the pipe to it."""

    def __init__(self) -> None:
        ours, theirs = get_context("spawn").Pipe()
        self.pipe = cast(Connection, ours)
        handle = theirs.fileno()
        # The process finds the same packages, and ignores variables and folders that could replace them.
        path = json.dumps([str(Path(entry).absolute()) for entry in sys.path if entry])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, path, str(handle)],
            pass_fds=[handle],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()

    def ask(self, request: bytes, seconds: float) -> tuple[dict[str, Any], NDArray | None]:
        try:
            self.pipe.send_bytes(request)
            if not self.pipe.poll(seconds):
                raise _Died(f"reading it takes more than {seconds:.0f} seconds", slow=True)
            reply = json.loads(self.pipe.recv_bytes())
            if not reply.pop("voxels", False):
                return reply, None
            with os.fdopen(recv_handle(self.pipe), "r+b") as file:
                size = math.prod(reply["shape"]) * np.dtype(reply["dtype"]).itemsize
                # Pages that are mapped at once take far less time than one by one.
                memory = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        except (EOFError, OSError) as error:
            raise self._death() from error
        return reply, np.ndarray(tuple(reply["shape"]), np.dtype(reply["dtype"]), memory, order="F")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def _death(self) -> _Died:
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return _Died("the process that read it fell silent")
        if code == -signal.SIGPROF:
            return _Died("reading it takes far longer than its size allows", slow=True)
        if code == -signal.SIGKILL:
            return _Died("the system ended the process that read it, perhaps because memory ran out")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Died(f"the process that read it crashed ({name}), as damaged files can make it")


@atexit.register
def _stop_all() -> None:
    while _idle:
        with suppress(Exception):
            _idle.pop().stop()


if hasattr(os, "register_at_fork"):
    # A forked process must not use the pipes of its parent.
    os.register_at_fork(after_in_child=_idle.clear)


def main(handle: int) -> None:
    """Read images until the pipe closes, in a reading process.

    Args:
        handle: file descriptor of the pipe.
    """
    # Ctrl-C is left to the parent process, whose end closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    without_core_dumps()
    pipe = Connection(handle)
    while True:
        try:
            folder, function, image, size, voxels = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        with suppress(OSError):
            os.chdir(folder)
        reply, file = _answer(function, image, size, voxels)
        pipe.send_bytes(json.dumps(reply).encode())
        if file is not None:
            with file:
                send_handle(pipe, file.fileno(), 0)


def _answer(function: Callable, image: Any, size: int, voxels: bool) -> tuple[dict[str, Any], IO[bytes] | None]:
    # Loading libraries takes time and memory of its own.
    for library in getattr(sys.modules[function.__module__], "LIBRARIES", ()):
        importlib.import_module(library)
    limit(size)
    try:
        result = function(image)
        if not isinstance(result, Opened):
            return {"value": result}, None
        reply = {"shape": result.shape, "dtype": result.dtype.str, "affine": result.affine.tolist(), "voxels": voxels}
        return reply, _filled(result, image, size) if voxels else None
    except FlapsamError as error:
        message = str(error)
    except MemoryError:
        message = f"{image}: reading it takes far more memory than its size allows; copy or export it again"
    except Exception as error:
        message = f"{image}: it cannot be read ({type(error).__name__}: {error}); copy or export it again"
    finally:
        without_time_limit()
    message = " ".join(message.split())
    return {"error": message if len(message) <= LONGEST else f"{message[:LONGEST]} …"}, None


def _filled(opened: Opened, image: Path | Any, size: int) -> IO[bytes]:
    """The file that holds an image's voxels, after reading them."""
    limit(size + opened.size)
    file = shared(image, opened.size)
    try:
        opened.write(file, image)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file
