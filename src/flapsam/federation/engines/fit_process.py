"""The process in which a site fits. Its network stays loaded between rounds, and the engine survives if the process dies."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from flapsam.base.escaping import one_line
from flapsam.federation.hospitals.handshake import REASONS, SiteFailed
from flapsam.federation.hospitals.site_config import SiteConfig


class FitProcess:
    """The engine's handle on a site's fit process. It does not load torch."""

    def __init__(self, name: str, site_config: Path) -> None:
        """Prepare to start the process.

        Args:
            name: the site's name in the federation.
            site_config: path of the site's configuration.
        """
        self.name = name
        self.site_config = site_config
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.proposal: bytes | None = None

    def start(self) -> bool:
        """Start the process if it is not running. It takes seconds until it is ready.

        Returns:
            Whether a new process was started.
        """
        if self.process is not None and self.process.poll() is None:
            return False
        self.stop()
        ours, theirs = get_context("spawn").Pipe()
        self.pipe = cast(Connection, ours)
        handle = theirs.fileno()
        command = [sys.executable, "-m", __name__, self.name, str(self.site_config.absolute()), str(handle)]
        # An engine sets these variables to carry packets in little memory, but they would slow down a fit.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.process = subprocess.Popen(command, pass_fds=[handle], stdin=subprocess.DEVNULL, env=environment)
        theirs.close()
        return True

    def join(self, proposal: bytes) -> bytes:
        """Run ``SiteSide.join`` in the process.

        Args:
            proposal: the server's proposal message.

        Returns:
            The site's presence message.

        Raises:
            SiteFailed: the site does not take part, or the process died.
        """
        self.proposal = proposal
        self.start()
        return self._ask("join", [memoryview(proposal)])

    def ask(self, work: str, packets: list[memoryview]) -> bytes:
        """Have ``SiteSide`` do some work in the process. Start a new process if the last one died.

        Args:
            work: ``fit``, ``agree``, ``validate``, ``own`` or ``test``.
            packets: the server's packets. Each is removed from the list once it is sent, to free its memory.

        Returns:
            The site's answer.

        Raises:
            SiteFailed: the work failed, or the process died.
        """
        if self.proposal is None:
            raise SiteFailed("error")
        if self.start():
            self._ask("join", [memoryview(self.proposal)])
        return self._ask(work, packets)

    def stop(self) -> None:
        """Kill the process, even in the middle of a fit. The files that it has written stay."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.pipe is not None:
            self.pipe.close()
        self.process = self.pipe = None

    def _ask(self, work: str, parts: list[memoryview]) -> bytes:
        assert self.pipe is not None
        try:
            self.pipe.send_bytes(json.dumps([work, [len(part) for part in parts]]).encode())
            while parts:
                self.pipe.send_bytes(parts.pop(0))
            code, size = json.loads(self.pipe.recv_bytes(1 << 10))
            if code:
                raise SiteFailed(code if code in REASONS else "error")
            return received(self.pipe, size)
        except (EOFError, OSError) as error:
            self.stop()
            raise SiteFailed("died") from error


def received(pipe: Connection, size: int) -> bytearray:
    """Receive a known number of bytes into one buffer, because ``recv_bytes`` would hold them twice."""
    data = bytearray(size)
    pipe.recv_bytes_into(data)
    return data


def main(name: str, site_config: Path, handle: int) -> None:
    """Serve an engine until it ends or closes the pipe.

    Args:
        name: the site's name in the federation.
        site_config: path of the site's configuration.
        handle: file descriptor of the pipe to the engine.
    """
    # Only the owner may read the site's data and state.
    os.umask(0o077)
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe = Connection(handle)
    from flapsam.base.files import alone
    from flapsam.federation.hospitals.site_config import read_site_config
    from flapsam.federation.hospitals.site_side import SiteSide, failing_as

    side: SiteSide | None = None
    locks = []
    while True:
        try:
            work, sizes = json.loads(pipe.recv_bytes(1 << 20))
            parts = [received(pipe, size) for size in sizes]
        except EOFError:
            return
        try:
            if side is None:
                with failing_as("data"):
                    config = read_site_config(site_config)
                    _log_to(config.log)
                    limit_memory(config)
                    # Only once, because this process would wait for its own lock.
                    if not locks:
                        locks.append(alone(config.lock))
                    side = SiteSide(name, config)
            # Packets are released as they are read, so that their memory is free for the fit.
            packets = (parts.pop(0) for _ in sizes)
            answer: bytes = side.join(bytes(next(packets))) if work == "join" else getattr(side, work)(packets)
            code = ""
        except SiteFailed as failure:
            code, answer = str(failure), b""
        pipe.send_bytes(json.dumps([code, len(answer)]).encode())
        if not code:
            pipe.send_bytes(answer)


def limit_memory(site: SiteConfig) -> None:
    """Have the operating system refuse this process more memory than the site allows.

    It is for Linux and for training on the processor: drivers of other devices reserve far more than they use.

    Args:
        site: the site's configuration.
    """
    if sys.platform != "linux" or site.device != "cpu":
        return
    import resource

    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min(int(site.memory_gib * 2**30), machine) if site.memory_gib else machine
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _end_with(parent: int) -> None:
    """End this process when its parent ends, even in the middle of a fit."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _log_to(path: Path) -> None:
    from flapsam.base.files import make_folder

    make_folder(path.parent)
    # The umask that ``main`` has set keeps the file private.
    handler = logging.FileHandler(path)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


class OneLine(logging.Formatter):
    """Writes each message on one line, so that text from other participants cannot look like a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: D102, N802
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: D102, N802
        return "\n".join(f"    {one_line(line)}" for line in super().formatException(ei).splitlines())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
