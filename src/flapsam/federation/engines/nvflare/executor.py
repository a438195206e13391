"""What NVFLARE runs at a site: it hands packets to the process that fits, and says nothing of what goes wrong but a code."""

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

from flapsam.base.version import __version__
from flapsam.federation.engines.fit_process import FitProcess
from flapsam.federation.hospitals.handshake import SiteFailed

ANSWER, CODE, SECONDS, NUMBER, PACKETS, VERSION = "answer", "code", "seconds", "number", "packets", "version"
"""Entries of what travels."""
ALIVE = "flapsam.alive"
"""What a site says all the while: NVFLARE does not notice that one has died which is back at once."""
ALIVE_SECONDS = 3
"""Between two signs of life."""
REGROUP = "flapsam.regroup"
"""The administrator's command to the server to end the job after the round under way."""
SITE_CONFIG = "FLAPSAM_SITE_CONFIG"
"""Environment variable: the site's own file. It is the site's to set, so no job can choose another."""


class FlapsamExecutor(Executor):
    """Lives as long as the job, and so does the process that fits."""

    process: FitProcess

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:  # noqa: D102
        if event_type == EventType.START_RUN:
            self.process = FitProcess(str(fl_ctx.get_identity_name()), Path(os.environ[SITE_CONFIG]))
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
            # Taken out, so that a packet is not held while a fit goes on.
            packets = [memoryview(packet) for packet in shareable.pop(PACKETS)]
            answer = process.join(bytes(packets[0])) if task_name == "join" else process.ask(task_name, packets)
            reply[CODE], reply[ANSWER] = "", np.frombuffer(answer, np.uint8)
        except SiteFailed as failure:
            reply[CODE] = str(failure)
        except Exception as error:
            self.log_exception(fl_ctx, f"{type(error).__name__} in task {task_name}")
            reply[CODE] = "error"
        finally:
            done.set()
        reply[SECONDS] = time.perf_counter() - started
        return reply

    def _say_alive(self, engine: Any) -> None:
        while not self.ended.wait(ALIVE_SECONDS):
            # A line that is cut for a while must not silence the site for good.
            with suppress(Exception), engine.new_context() as context:
                engine.fire_and_forget_aux_request(ALIVE, Shareable(), context, optional=True)


def _stop_if(abort: Signal, done: threading.Event, process: FitProcess) -> None:
    """End the fit when the job is aborted."""
    while not done.wait(0.2):
        if abort.triggered:
            process.stop()
            return
