"""The process in which a site fits: its network stays loaded from round to round, and if it dies the engine goes on."""

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
from typing import cast

from flapsam.federation.hospitals.handshake import REASONS, SiteFailed


class FitProcess:
    """The engine's side. Nothing here loads torch."""

    def __init__(self, name: str, site_config: Path) -> None:
        """Know the site.

        Args:
            name: of the site in the federation.
            site_config: its own file.
        """
        self.name = name
        self.site_config = site_config
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.proposal: bytes | None = None

    def start(self) -> bool:
        """Let there be a process; returns whether it is new. It takes seconds until it is ready."""
        if self.process is not None and self.process.poll() is None:
            return False
        self.stop()
        ours, theirs = get_context("spawn").Pipe()
        self.pipe = cast(Connection, ours)
        handle = theirs.fileno()
        command = [sys.executable, "-m", __name__, self.name, str(self.site_config.absolute()), str(handle)]
        # What an engine sets so as to carry packets in little memory would make a fit slow.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.process = subprocess.Popen(command, pass_fds=[handle], stdin=subprocess.DEVNULL, env=environment)
        theirs.close()
        return True

    def join(self, proposal: bytes) -> bytes:
        """As ``SiteSide.join``.

        Raises:
            SiteFailed: with the code.
        """
        self.proposal = proposal
        self.start()
        return self._ask("join", [memoryview(proposal)])

    def ask(self, work: str, packets: list[memoryview]) -> bytes:
        """``fit`` or ``validate``, as ``SiteSide`` does it. A process that has died before is begun anew.

        Args:
            work: which.
            packets: each is taken out when it has been handed over, so that it need not be held meanwhile.

        Raises:
            SiteFailed: with the code.
        """
        if self.proposal is None:
            raise SiteFailed("error")
        if self.start():
            self._ask("join", [memoryview(self.proposal)])
        return self._ask(work, packets)

    def stop(self) -> None:
        """End the process, whatever it is at. What it has written stays."""
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
    """So many bytes, in one place: ``recv_bytes`` would hold them twice."""
    data = bytearray(size)
    pipe.recv_bytes_into(data)
    return data


def main(name: str, site_config: Path, handle: int) -> None:
    """Serve an engine until it is gone."""
    # What is kept of a site's data and state is for its owner alone.
    os.umask(0o077)
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe = Connection(handle)
    from flapsam.base.files import alone
    from flapsam.federation.hospitals.site_config import read_site_config
    from flapsam.federation.hospitals.site_side import SiteSide, failing_as

    participant: SiteSide | None = None
    locks = []
    while True:
        try:
            work, sizes = json.loads(pipe.recv_bytes(1 << 20))
            parts = [received(pipe, size) for size in sizes]
        except EOFError:
            return
        try:
            if participant is None:
                with failing_as("data"):
                    config = read_site_config(site_config)
                    _log_to(config.log)
                    locks.append(alone(config.lock))
                    participant = SiteSide(name, config)
            # Each packet is let go when it has been read: a fit follows.
            read = (parts.pop(0) for _ in sizes)
            answer: bytes = participant.join(bytes(next(read))) if work == "join" else getattr(participant, work)(read)
            code = ""
        except SiteFailed as failure:
            code, answer = str(failure), b""
        pipe.send_bytes(json.dumps([code, len(answer)]).encode())
        if not code:
            pipe.send_bytes(answer)


def _end_with(parent: int) -> None:
    """End this process when the one that began it is gone, in the middle of a fit if need be."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(filename=path, level=logging.INFO, format=form, force=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
