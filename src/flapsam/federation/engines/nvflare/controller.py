"""What NVFLARE runs at the server: it sends each site its packets and collects the answers."""

import itertools
import queue
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import ReturnCode, Shareable, make_reply
from nvflare.apis.signal import Signal

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder
from flapsam.base.version import __version__
from flapsam.federation.engines.nvflare.executor import ALIVE, ANSWER, CODE, NUMBER, PACKETS, REGROUP, SECONDS, VERSION
from flapsam.federation.engines.nvflare.kits import HEARTBEAT_SECONDS
from flapsam.federation.hospitals.handshake import GONE, LIMIT, REASONS, VERSION_PATTERN
from flapsam.federation.hospitals.server_side import ServerSide
from flapsam.federation.packets import FRAMING_BYTES
from flapsam.federation.rounds import Answer, Work
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, JobEnded, JobStarted

JOIN_SECONDS = 900
"""A site unpacks its volumes before it answers the handshake."""
GONE_SECONDS = 2 * HEARTBEAT_SECONDS
"""Of silence, after which a site is taken for gone. The server itself has forgotten it by then, if it is not back."""


@dataclass(frozen=True)
class Received:
    """An answer as it came."""

    site: str
    number: int
    """Of the request that it answers; -1 if it does not say."""
    content: Path | None = None
    """Where it waits, on the disk: many may come while one is worked at."""
    problem: str = ""
    seconds: float | None = None

    def take(self) -> bytes:
        """What it holds; once."""
        if self.content is None:
            return b""
        data = self.content.read_bytes()
        self.content.unlink()
        return data


@dataclass
class Post:
    """Sends requests to sites and gives the answers one after another."""

    controller: "FlapsamController"
    context: FLContext
    abort: Signal
    number: int = 0
    """Of the newest request."""
    tasks: dict[str, Task] = field(default_factory=dict)

    def ask(self, name: str, requests: Iterator[tuple[str, Shareable]], deadline: float) -> Iterator[Received]:
        """Send requests; give every answer that comes until all have answered or are gone, or the time is up."""
        self.number += 1
        for site, data in requests:
            data[NUMBER] = self.number
            task = Task(name, data, timeout=0, after_task_sent_cb=forget_data, result_received_cb=self.controller.receive)
            self.controller.send(task, self.context, targets=[site])
            self.tasks[site] = task
        until = time.monotonic() + deadline
        while self.tasks:
            try:
                received = self.controller.answers.get(timeout=0.05)
                if received.number == self.number:
                    self.tasks.pop(received.site, None)
                yield received
                continue
            except queue.Empty:
                pass
            if self.abort.triggered:
                raise Aborted
            for site in list(self.tasks):
                if self.controller.silence(site) > GONE_SECONDS:
                    yield self._give_up(site, GONE)
                elif time.monotonic() > until:
                    yield self._give_up(site, f"no answer within {deadline:g} s")

    def _give_up(self, site: str, reason: str) -> Received:
        self.controller.cancel_task(self.tasks.pop(site))
        return Received(site, self.number, problem=reason)


def forget_data(client_task: ClientTask, fl_ctx: FLContext) -> None:
    """A packet need not be held until its answer comes; NVFLARE has it by now."""
    client_task.task.data = Shareable()


class Aborted(Exception):  # noqa: N818 (nothing is wrong)
    """The job was ended from outside."""


class FlapsamController(Controller):
    """The server's side of one job: a part of a run, from a handshake to the run's end or to the next handshake."""

    def __init__(self, folder: str) -> None:
        """Know the run.

        Args:
            folder: of a run that was begun at the server.
        """
        super().__init__(task_check_period=0.1)
        self.folder = folder
        self.arrivals = RunFolder(Path(folder)).arrivals
        self.arrived = itertools.count()
        self.limit = LIMIT
        self.answers: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self.regroup = False
        self.started = time.monotonic()
        self.heard: dict[str, float] = {}

    def start_controller(self, fl_ctx: FLContext) -> None:  # noqa: D102
        engine: Any = fl_ctx.get_engine()
        engine.register_app_command(REGROUP, self._regroup)
        engine.register_aux_message_handler(ALIVE, self._hear)
        self.started = time.monotonic()

    def stop_controller(self, fl_ctx: FLContext) -> None:  # noqa: D102
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:  # noqa: D102
        server = ServerSide(Path(self.folder))
        # What does not shrink grows by some thousandths.
        self.limit = int(1.01 * server.agreement.contract.tensor_bytes) + FRAMING_BYTES
        shutil.rmtree(self.arrivals, ignore_errors=True)
        post = Post(self, fl_ctx, abort_signal)
        sites = sorted(client.name for client in fl_ctx.get_engine().get_clients())  # type: ignore[union-attr]
        job = {"cohort": TOGETHER, "job": fl_ctx.get_job_id()}
        server.ledger.write(JobStarted(**job, sites=sites))
        try:
            self._shake_hands(server, post, sites)
            server.open()
            done = server.train(lambda work: self._carry(server, post, work), lambda: self.regroup)
            server.ledger.write(JobEnded(**job, outcome="done" if done else "regroup"))
        except FlapsamError as error:
            server.ledger.write(JobEnded(**job, outcome="stopped", reason=str(error)))
        except Aborted:
            server.ledger.write(JobEnded(**job, outcome="aborted"))

    def process_result_of_unknown_task(  # noqa: D102
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        self._keep(client.name, result)

    def receive(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Take an answer, and let NVFLARE forget it."""
        self._keep(client_task.client.name, client_task.result or Shareable())
        client_task.result = None

    def _keep(self, site: str, result: Shareable) -> None:
        received, content = read_answer(site, result, self.limit)
        if content is not None:
            path = make_folder(self.arrivals) / f"{next(self.arrived)}"
            content.tofile(path)
            received = replace(received, content=path)
        self.answers.put(received)

    def silence(self, site: str) -> float:
        """Seconds since a site was heard of."""
        return time.monotonic() - self.heard.get(site, self.started)

    def _hear(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        peer = fl_ctx.get_peer_context()
        if peer is not None:
            self.heard[str(peer.get_identity_name())] = time.monotonic()
        return make_reply(ReturnCode.OK)

    def _regroup(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        self.regroup = True
        return {}

    def _shake_hands(self, server: ServerSide, post: Post, sites: list[str]) -> None:
        def requests() -> Iterator[tuple[str, Shareable]]:
            for site in sites:
                data = Shareable()
                data[PACKETS] = [np.frombuffer(server.proposal, np.uint8)]
                yield site, data

        for received in post.ask("join", requests(), JOIN_SECONDS):
            if received.problem:
                server.exclude(received.site, received.problem)
            elif received.number == post.number:
                server.admit(received.site, received.take())

    def _carry(self, server: ServerSide, post: Post, work: Work) -> Iterator[Answer]:
        bytes_down: dict[str, int] = {}

        def requests() -> Iterator[tuple[str, Shareable]]:
            # Sites that need the same packets share them in memory.
            made: dict[tuple[int, int], list[np.ndarray]] = {}
            for site in server.held:
                key = server.agreement.rank(site), server.held[site]
                if key not in made:
                    made[key] = [np.frombuffer(packet, np.uint8) for packet in server.packets(site)]
                bytes_down[site] = sum(packet.nbytes for packet in made[key])
                data = Shareable()
                data[PACKETS] = made[key]
                yield site, data

        for received in post.ask(work, requests(), server.config.rounds.deadline):
            down = bytes_down.get(received.site, 0)
            if received.problem:
                # Of an earlier round it was told then that nothing came.
                if received.number == post.number:
                    yield Answer(received.site, down, missing=received.problem)
            elif work == "fit":
                yield Answer(received.site, down, fitted=received.take(), seconds=received.seconds)
            elif received.number == post.number:
                scores = server.read_scores(received.take())
                missing = "" if scores is not None else "scores that cannot be read"
                yield Answer(received.site, down, scores=scores, missing=missing)


def read_answer(site: str, result: Shareable, limit: int) -> tuple[Received, np.ndarray | None]:
    """What a site answered, and its bytes, at most ``limit``; what cannot be read is a problem."""
    number = result.get(NUMBER)
    number = number if isinstance(number, int) else -1
    if result.get_return_code() != ReturnCode.OK:
        return Received(site, number, problem=REASONS["error"]), None
    code, content, seconds, version = (result.get(entry) for entry in (CODE, ANSWER, SECONDS, VERSION))
    if code == "version" and isinstance(version, str) and re.fullmatch(VERSION_PATTERN, version):
        return Received(site, number, problem=f"it runs flapsam {version}, the server {__version__}"), None
    if code:
        return Received(site, number, problem=REASONS.get(code if isinstance(code, str) else "", REASONS["error"])), None
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or content.ndim != 1:
        return Received(site, number, problem="an answer that cannot be read"), None
    if content.nbytes > limit:
        return Received(site, number, problem=f"an answer of {content.nbytes} bytes, {limit} are allowed"), None
    return Received(site, number, seconds=float(seconds) if isinstance(seconds, float) else None), content
