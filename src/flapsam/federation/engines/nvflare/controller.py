"""NVFLARE's controller at the server. It sends packets to the sites and collects their answers."""

import itertools
import queue
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
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
from flapsam.federation.engines.nvflare.intake import INTAKE
from flapsam.federation.engines.nvflare.kits import HEARTBEAT_SECONDS
from flapsam.federation.hospitals.handshake import GONE, REASONS, VERSION_PATTERN
from flapsam.federation.hospitals.server_side import ServerSide
from flapsam.federation.packets import FRAMING_BYTES
from flapsam.federation.rounds import Answer, Work
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, JobEnded, JobStarted

LEAST_REMINDER = 5
"""Smallest number of seconds between two reminders of a required site."""
JOIN_SECONDS = 900
"""Deadline of the handshake. It is long, because a site unpacks its volumes before it answers."""
GONE_SECONDS = 2 * HEARTBEAT_SECONDS
"""Seconds of silence after which a site counts as lost. By then NVFLARE's server has dropped it, unless it is back."""


@dataclass(frozen=True)
class Received:
    """A site's answer to a request, not yet validated."""

    site: str
    number: int
    """Number of the request that is answered; -1 if unknown."""
    content: Path | None = None
    """File that holds the answer. It is on disk, because many answers may arrive while another is processed."""
    problem: str = ""
    """Why there is no usable answer; empty if there is one."""
    seconds: float | None = None
    """Seconds that the site says it took, if it does."""
    waited: float = 0.0
    """Seconds from the request to the answer."""

    def take(self) -> bytes:
        """Read the answer and delete its file."""
        if self.content is None:
            return b""
        data = self.content.read_bytes()
        self.content.unlink()
        return data


@dataclass
class Post:
    """Sends requests to sites and yields their answers one after another."""

    controller: "FlapsamController"
    context: FLContext
    abort: Signal
    number: int = 0
    """Number of the newest request."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """Open task of each site that has not answered yet."""

    def ask(
        self,
        name: str,
        requests: Iterator[tuple[str, Shareable]],
        patience: Callable[[str], float],
        awaited: Callable[[str, float, float], object],
        remind: float,
    ) -> Iterator[Received]:
        """Send requests to sites and collect the answers.

        Args:
            name: name of the task: ``join``, ``fit``, ``agree``, ``validate``, ``own`` or ``test``.
            requests: each site and its request.
            patience: seconds to wait for a site's answer.
            awaited: called with a site that is still waited for, the seconds since the request, and those that are left:
                once after half of its patience, or again and again if that has no end.
            remind: seconds between two such calls.

        Yields:
            Each answer as it arrives, also late ones to earlier requests. A site that falls silent or misses the deadline
            yields a problem instead.

        Raises:
            Aborted: the job was aborted.
        """
        self.number += 1
        for site, data in requests:
            data[NUMBER] = self.number
            task = Task(name, data, timeout=0, after_task_sent_cb=forget_data, result_received_cb=self.controller.receive)
            INTAKE.expect(site, self.number)
            self.controller.send(task, self.context, targets=[site])
            self.tasks[site] = task
        asked = time.monotonic()
        reminded: Counter[str] = Counter()
        while self.tasks:
            try:
                received = self.controller.answers.get(timeout=0.05)
                if received.number == self.number:
                    self.tasks.pop(received.site, None)
                    received = replace(received, waited=time.monotonic() - asked)
                yield received
                continue
            except queue.Empty:
                pass
            if self.abort.triggered:
                raise Aborted
            for site in list(self.tasks):
                if self.controller.silence(site) > GONE_SECONDS:
                    yield self._give_up(site, GONE)
                elif (waited := time.monotonic() - asked) > (most := patience(site)):
                    yield self._give_up(site, f"no answer within {most:g} s")
                elif is_due(waited, most, remind, reminded[site]):
                    reminded[site] += 1
                    awaited(site, waited, most - waited)

    def _give_up(self, site: str, reason: str) -> Received:
        self.controller.cancel_task(self.tasks.pop(site))
        return Received(site, self.number, problem=reason)


def is_due(waited: float, patience: float, remind: float, reminded: int) -> bool:
    """Whether it is time to say that a site is still waited for.

    Args:
        waited: seconds since the request.
        patience: seconds that the site has in all.
        remind: seconds between two reminders of a site that has no limit.
        reminded: number of reminders so far.
    """
    return waited > (reminded + 1) * remind if patience == inf else not reminded and waited > patience / 2


def forget_data(client_task: ClientTask, fl_ctx: FLContext) -> None:
    """Release a packet's memory once it is sent. NVFLARE would keep it until the answer arrives.

    The number stays. If NVFLARE sends the request again, because it was lost on the way, the site then answers that it
    cannot use it, and the answer is recognised as one to this request.
    """
    empty = Shareable()
    empty[NUMBER] = client_task.task.data.get(NUMBER)
    client_task.task.data = empty


class Aborted(Exception):  # noqa: N818 (nothing is wrong)
    """The job was aborted from outside."""


class FlapsamController(Controller):
    """The server's side of one job. A job is the part of a run from one handshake to the next, or to the run's end."""

    def __init__(self, folder: str) -> None:
        """Prepare the job.

        Args:
            folder: the run's folder at the server, which must exist already.
        """
        super().__init__(task_check_period=0.1)
        self.folder = folder
        self.arrivals = RunFolder(Path(folder)).arrivals
        self.arrived = itertools.count()
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
        # Data that do not compress grow slightly.
        INTAKE.limit = int(1.01 * server.agreement.contract.tensor_bytes) + FRAMING_BYTES
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
        """Take an answer, and release NVFLARE's copy."""
        self._keep(client_task.client.name, client_task.result or Shareable())
        client_task.result = None

    def _keep(self, site: str, result: Shareable) -> None:
        """Write an answer to disk and queue it, if it was asked for."""
        received, content = read_answer(site, result, INTAKE.limit)
        if not INTAKE.take(site, received.number):
            return
        if content is not None:
            path = make_folder(self.arrivals) / f"{next(self.arrived)}"
            content.tofile(path)
            received = replace(received, content=path)
        self.answers.put(received)

    def silence(self, site: str) -> float:
        """Seconds since the last sign of life from a site."""
        return time.monotonic() - self.heard.get(site, self.started)

    def _hear(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """Note a site's sign of life."""
        peer = fl_ctx.get_peer_context()
        if peer is not None:
            self.heard[str(peer.get_identity_name())] = time.monotonic()
        return make_reply(ReturnCode.OK)

    def _regroup(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        """End the job after the current round, at the coordinator's request."""
        self.regroup = True
        return {}

    def _shake_hands(self, server: ServerSide, post: Post, sites: list[str]) -> None:
        """Propose the run to the sites, and admit or exclude each."""

        def requests() -> Iterator[tuple[str, Shareable]]:
            for site in sites:
                data = Shareable()
                data[PACKETS] = [np.frombuffer(server.proposal, np.uint8)]
                yield site, data

        def patience(site: str) -> float:
            return inf if site in server.config.rounds.named else JOIN_SECONDS

        awaited = partial(server.await_answer, "join")
        for received in post.ask("join", requests(), patience, awaited, JOIN_SECONDS / 3):
            if received.problem:
                server.exclude(received.site, received.problem)
            elif received.number == post.number:
                server.admit(received.site, received.take())

    def _carry(self, server: ServerSide, post: Post, work: Work) -> Iterator[Answer]:
        """Send each site its packets and yield the answers, as ``rounds`` expects from an engine."""
        bytes_down: dict[str, int] = {}

        def requests() -> Iterator[tuple[str, Shareable]]:
            # Sites that need the same packets share them in memory.
            packets: dict[tuple[int, int, str], list[np.ndarray]] = {}
            for site in server.asked(work):
                # In secure aggregation, every site has a message of its own.
                key = server.agreement.rank(site), server.held[site], site if server.agreement.secure else ""
                if key not in packets:
                    packets[key] = [np.frombuffer(packet, np.uint8) for packet in server.packets(site, work)]
                bytes_down[site] = sum(packet.nbytes for packet in packets[key])
                data = Shareable()
                data[PACKETS] = packets[key]
                yield site, data

        awaited = partial(server.await_answer, work)
        remind = max(server.config.rounds.deadline, LEAST_REMINDER)
        for received in post.ask(work, requests(), server.patience, awaited, remind):
            down = bytes_down.get(received.site, 0)
            if received.problem:
                # A problem with an earlier request was already reported as a missing answer.
                if received.number == post.number:
                    yield Answer(received.site, down, missing=received.problem)
            elif work == "fit":
                if received.number == post.number:
                    server.took(received.site, received.waited)
                yield Answer(received.site, down, fitted=received.take(), seconds=received.seconds)
            elif work == "agree":
                content = received.take()
                # A late answer belongs to another step.
                if received.number == post.number:
                    yield Answer(received.site, down, fitted=content)
            elif work == "own":
                received.take()
                yield Answer(received.site, down)
            elif work == "test":
                content = received.take()
                # A late answer may be about other tensors.
                if received.number == post.number:
                    yield _tested(server, received.site, content, down)
            elif received.number == post.number:
                scores = server.read_scores(received.take())
                missing = "" if scores is not None else "its scores are invalid"
                yield Answer(received.site, down, scores=scores, missing=missing)


def _tested(server: ServerSide, site: str, content: bytes, down: int) -> Answer:
    """A site's test scores."""
    try:
        return Answer(site, down, tested=server.read_tested(site, content))
    except ValueError:
        return Answer(site, down, missing="its test scores are invalid")


def read_answer(site: str, result: Shareable, limit: int) -> tuple[Received, np.ndarray | None]:
    """Validate the form of a site's answer.

    Args:
        site: the site's name.
        result: the answer as NVFLARE delivers it.
        limit: maximum size of the content in bytes.

    Returns:
        The answer without its content, and the content. An invalid answer has a problem and no content.
    """
    number = result.get(NUMBER)
    number = number if isinstance(number, int) else -1
    if result.get_return_code() != ReturnCode.OK:
        return Received(site, number, problem=REASONS["error"]), None
    code, content, seconds, version = (result.get(entry) for entry in (CODE, ANSWER, SECONDS, VERSION))
    if code == "version" and isinstance(version, str) and re.fullmatch(VERSION_PATTERN, version):
        return Received(site, number, problem=f"it runs flapsam {version}, the server runs {__version__}"), None
    if code:
        return Received(site, number, problem=REASONS.get(code if isinstance(code, str) else "", REASONS["error"])), None
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or content.ndim != 1:
        return Received(site, number, problem="its answer is invalid"), None
    if content.nbytes > limit:
        return Received(site, number, problem=f"its answer has {content.nbytes} bytes, the limit is {limit}"), None
    return Received(site, number, seconds=float(seconds) if isinstance(seconds, float) else None), content
