"""NVFLARE's executor at a site. It hands packets to the fit process, and reports failures as codes only."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from flapsam.base.errors import FlapsamError
from flapsam.base.version import __version__
from flapsam.federation.engines.fit_process import FitProcess
from flapsam.federation.hospitals.handshake import Proposal, SiteFailed, read_message
from flapsam.federation.hospitals.site_config import read_site_config

ANSWER, CODE, SECONDS, NUMBER, PACKETS, VERSION = "answer", "code", "seconds", "number", "packets", "version"
"""Keys of the entries in requests and answers."""
ALIVE = "flapsam.alive"
"""Topic of a site's signs of life. NVFLARE alone does not notice if a site dies and reconnects at once."""
ALIVE_SECONDS = 3
"""Seconds between two signs of life."""
REGROUP = "flapsam.regroup"
"""Command from the coordinator to the server to end the job after the current round."""
SITE_CONFIG = "FLAPSAM_SITE_CONFIG"
"""Environment variable with the path of the site's configuration. The site sets it, so no job can choose another file."""


class FlapsamExecutor(Executor):
    """A site's side of one job. The fit process lives as long as the job."""

    process: FitProcess

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.reports_seconds = False
        self.private = True
        """Whether the run has differential privacy, so that the site does not report times."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:  # noqa: D102
        if event_type == EventType.START_RUN:
            config = Path(os.environ[SITE_CONFIG])
            self.process = FitProcess(str(fl_ctx.get_identity_name()), config)
            with suppress(FlapsamError):
                # The fit process reports an invalid configuration.
                self.reports_seconds = read_site_config(config).metrics
            self.process.start()
            threading.Thread(target=self._say_alive, args=(fl_ctx.get_engine(),), daemon=True).start()
        elif event_type == EventType.END_RUN:
            self.ended.set()
            self.process.stop()

    def execute(  # noqa: D102
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        started = time.perf_counter()
        reply = Shareable()
        reply[NUMBER], reply[VERSION] = shareable.get(NUMBER), __version__
        done = threading.Event()
        try:
            process = self.process
            threading.Thread(target=_stop_if, args=(abort_signal, done, process), daemon=True).start()
            # The packets are removed from the request, so that their memory is free during a fit.
            packets = [memoryview(packet) for packet in shareable.pop(PACKETS)]
            if task_name == "join":
                self.private = _is_private(bytes(packets[0]))
            answer = process.join(bytes(packets[0])) if task_name == "join" else process.ask(task_name, packets)
            reply[CODE], reply[ANSWER] = "", np.frombuffer(answer, np.uint8)
        except SiteFailed as failure:
            reply[CODE] = str(failure)
        except Exception as error:
            self.log_exception(fl_ctx, f"{type(error).__name__} in task {task_name}")
            reply[CODE] = "error"
        finally:
            done.set()
        if self.reports_seconds and not self.private:
            reply[SECONDS] = time.perf_counter() - started
        return reply

    def _say_alive(self, engine: Any) -> None:
        """Send signs of life until the job ends."""
        while not self.ended.wait(ALIVE_SECONDS):
            # A lost connection must not end the signs of life.
            with suppress(Exception), engine.new_context() as context:
                engine.fire_and_forget_aux_request(ALIVE, Shareable(), context, optional=True)


def _is_private(proposal: bytes) -> bool:
    """Whether a proposed run has differential privacy, or is none that this version can read."""
    try:
        return read_message(Proposal, proposal).config.get("privacy") is not None
    except FlapsamError:
        return True


def _stop_if(abort: Signal, done: threading.Event, process: FitProcess) -> None:
    """Stop the fit process when the job is aborted."""
    while not done.wait(0.2):
        if abort.triggered:
            process.stop()
            return
