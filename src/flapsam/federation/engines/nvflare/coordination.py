"""From the coordinator's chair: submit a run, follow it, submit it again after a crash or when a site is back, end it."""

import contextlib
import io
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from nvflare.fuel.flare_api.api_spec import AuthenticationError, AuthorizationError, InvalidJobDefinition
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from flapsam.config import RunConfig
from flapsam.errors import FlapsamError
from flapsam.federation.engines.nvflare.executor import REGROUP
from flapsam.federation.engines.nvflare.kits import ADMINISTRATOR, Kit
from flapsam.federation.folder import LEDGER, begin_run, found_run, is_begun
from flapsam.federation.handshake import GONE
from flapsam.federation.ledger import TOGETHER, Event, read_ledger
from flapsam.federation.observer import Observer

Result = TypeVar("Result")
PACKAGE = "flapsam.federation.engines.nvflare"
ATTEMPTS = 3
"""Jobs in a row that may end badly without a new round."""
WAIT_SECONDS = 60.0
"""For which sites that are not there yet are waited for, once there are enough."""
POLL_SECONDS = 1.0
ENDED = ("FINISHED", "ABANDONED", "FAILED")
"""How the status of a job begins that is over."""


class Unreachable(Exception):  # noqa: N818 (the server may come back)
    """The server does not answer."""


class Line:
    """The administrator's connection, made anew when it breaks."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        # What NVFLARE logs is said here in other words.
        logging.getLogger().addHandler(logging.NullHandler())
        self.session: Session | None = None

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def ask(self, question: Callable[[Session], Result]) -> Result:
        """Ask the server something.

        Raises:
            Unreachable: it does not answer.
            FlapsamError: it refuses.
        """
        # NVFLARE prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                if self.session is None:
                    self.session = new_secure_session(ADMINISTRATOR, str(self.kit.folder), timeout=5.0)
                return question(self.session)
            except (AuthenticationError, AuthorizationError, InvalidJobDefinition) as error:
                self._drop()
                raise FlapsamError(f"the server at {self.kit.card.server} refuses: {error}") from error
            except Exception as error:
                self._drop()
                raise Unreachable(str(error)) from error

    def _drop(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()


@dataclass
class Job:
    """One job of a run."""

    identity: str
    sites: list[str]
    started: Any
    """When the server that runs it was started."""
    regrouped: bool = False


@dataclass
class Run:
    """A run that is followed to its end."""

    config: RunConfig
    line: Line
    observer: Observer
    wait: float
    size: int = 0
    """Bytes of the ledger when it was read last."""
    seen: int = 0
    """Lines of it that the observer was told."""
    events: list[Event] = field(default_factory=list)

    def follow(self) -> Path:
        """Submit jobs until the run is done; returns the adapter's folder.

        Raises:
            FlapsamError: the run cannot be done.
        """
        folder = self.config.output
        run = found_run(self.config) if is_begun(folder) else begin_run(self.config)
        self.observer.opened(self.config, [])
        self._read_ledger()
        self.observer.begin(TOGETHER, self.config.rounds.count, self._rounds())
        bad = 0
        job = self._attach(run)
        while not self._done():
            if job is None:
                job = self._submit(run)
            before = self._rounds()
            outcome = self._watch(job)
            bad = 0 if self._rounds() > before or outcome == "regroup" else bad + 1
            if bad >= ATTEMPTS:
                reason = next((e["reason"] for e in reversed(self.events) if e["event"] == "job_end" and "reason" in e), "")
                advice = "see the server's log; the same command goes on"
                raise FlapsamError(f"the run does not get on{': ' + reason if reason else ''}; {advice}")
            job = None
        self.observer.end()
        return folder / "adapter"

    def _submit(self, run: str) -> Job:
        """A new job of the sites that are there."""
        sites = self._wait_for_sites()
        with tempfile.TemporaryDirectory() as folder:
            definition = write_job(Path(folder), run, self.config.output, sites, self.config.rounds.min_sites)
            identity = self._patiently(lambda session: session.submit_job(str(definition)))
        info = self._patiently(lambda session: session.get_system_info())
        return Job(identity, sites, info.server_info.start_time)

    def _attach(self, run: str) -> Job | None:
        """A job of this run that is under way already."""
        info = self._patiently(lambda session: session.get_system_info())
        for running in info.job_info:
            meta = self._patiently(lambda session, job=running.job_id: session.get_job_meta(job))
            if meta.get("name") == job_name(run):
                job = Job(running.job_id, [], info.server_info.start_time)
                job.sites = [site for event in self._of_job(job)[:1] for site in event["sites"]]
                return job
        return None

    def _watch(self, job: Job) -> str:
        """Until a job is over: tell what happens, and let it end when a site is back; returns how it ended."""
        asked = 0.0
        while True:
            time.sleep(0.2)
            self._read_ledger()
            if (end := self._end_of(job)) is not None:
                if end["outcome"] == "aborted" and self._was_stopped(job):
                    raise FlapsamError("the run was stopped; the same command goes on with it")
                return end["outcome"]
            if time.monotonic() - asked < POLL_SECONDS:
                continue
            try:
                info = self.line.ask(lambda session: session.get_system_info())
                meta = self.line.ask(lambda session: session.get_job_meta(job.identity))
            except Unreachable:
                self.observer.say("The server does not answer; waiting for it.")
                info = self._patiently(lambda session: session.get_system_info())
                meta = self._patiently(lambda session: session.get_job_meta(job.identity))
            asked = time.monotonic()
            if info.server_info.start_time != job.started:
                self.observer.say("The server was started anew; the run goes on from its last whole round.")
                return "crashed"
            if str(meta.get("status", "")).startswith(ENDED):
                self._read_ledger()
                if self._end_of(job) is None:
                    self.observer.say(f"The job has ended badly ({meta['status']}); it is submitted again.")
                    return "crashed"
                continue
            self._regroup_if_back(job, [client.name for client in info.client_info or []])

    def _end_of(self, job: Job) -> Event | None:
        return next((e for e in self.events if e["event"] == "job_end" and e["job"] == job.identity), None)

    def _was_stopped(self, job: Job) -> bool:
        """Whether somebody ended a job, and not the death of its server."""
        while True:
            info = self._patiently(lambda session: session.get_system_info())
            meta = self._patiently(lambda session: session.get_job_meta(job.identity))
            if info.server_info.start_time != job.started:
                return False
            if str(meta.get("status", "")).startswith(ENDED):
                return "ABORTED" in meta["status"]
            time.sleep(POLL_SECONDS)

    def _regroup_if_back(self, job: Job, connected: Sequence[str]) -> None:
        """Let the job end after its round if a site is there that does not take part in it."""
        gone, excluded = set[str](), set[str]()
        for event in self._of_job(job):
            if event["event"] == "missing" and event["reason"] == GONE:
                gone.add(event["site"])
            elif event["event"] == "fit":
                gone.discard(event["site"])
            elif event["event"] == "excluded":
                (gone if event["reason"] == GONE else excluded).add(event["site"])
        back = [site for site in self._wanted(connected) if site in gone or site not in job.sites]
        back = [site for site in back if site not in excluded]
        # Before the job has begun there is nothing that could end.
        if back and not job.regrouped and self._of_job(job):
            with contextlib.suppress(Unreachable):
                self.line.ask(lambda session: session.do_app_command(job.identity, REGROUP, {}))
                job.regrouped = True
                self.observer.say(f"{', '.join(back)} is there: takes part after this round.")

    def _of_job(self, job: Job) -> list[Event]:
        """What the ledger says since a job began."""
        for index, event in enumerate(self.events):
            if event["event"] == "job" and event["job"] == job.identity:
                return self.events[index:]
        return []

    def _wait_for_sites(self) -> list[str]:
        """The sites of the next job: all, or after a while those that are there, if they are enough."""
        everyone = self._wanted(self.line.kit.card.sites)
        enough = self.config.rounds.min_sites
        said: list[str] = []
        since = time.monotonic()
        while True:
            info = self._patiently(lambda session: session.get_system_info())
            there = sorted(self._wanted([client.name for client in info.client_info or []]))
            missing = sorted(set(everyone) - set(there))
            if not missing or (len(there) >= enough and time.monotonic() - since > self.wait):
                return there
            if missing != said:
                limit = f"; goes on without after {self.wait:g} s" if len(there) >= enough else ""
                self.observer.say(f"Waiting for {', '.join(missing)}{limit}.")
                said = missing
            time.sleep(POLL_SECONDS)

    def _wanted(self, names: Sequence[str]) -> list[str]:
        chosen = self.config.data.sites
        return [name for name in names if chosen is None or name in chosen]

    def _patiently(self, question: Callable[[Session], Result]) -> Result:
        """Ask until the server answers."""
        said = False
        while True:
            try:
                return self.line.ask(question)
            except Unreachable as error:
                if not said:
                    self.observer.say(f"No answer from the server at {self.line.kit.card.server}: {error}. Trying on.")
                    said = True
                time.sleep(POLL_SECONDS)

    def _read_ledger(self) -> None:
        path = self.config.output / LEDGER
        size = path.stat().st_size if path.exists() else 0
        if size == self.size:
            return
        self.size = size
        # A line may be half written.
        self.events = read_ledger(path, whole_lines=True)
        for event in self.events[self.seen :]:
            self.observer.event(event)
            if event["event"] == "round":
                self.observer.step()
        self.seen = len(self.events)

    def _rounds(self) -> int:
        return sum(event["event"] == "round" for event in self.events)

    def _done(self) -> bool:
        return any(event["event"] == "end" for event in self.events)


def run(config: RunConfig, kit: Kit, observer: Observer, *, wait: float = WAIT_SECONDS) -> Path:
    """Conduct a run to its end, going on with what its folder holds.

    Args:
        config: the run; where each site's data are is the site's to say.
        kit: the coordinator's.
        observer: is told what happens.
        wait: seconds for which sites that are not there yet are waited for, once there are enough.

    Returns:
        The adapter's folder.

    Raises:
        FlapsamError: the configuration is wrong, or the run does not get on.
    """
    # Here, because it takes seconds to load, for which a word to stop need not wait.
    from flapsam.federation.preparation import resolve

    config = resolve(config)
    odd = sorted(set(config.data.sites or []) - set(kit.card.sites))
    if odd:
        raise FlapsamError(f"data.sites: there is no site '{odd[0]}' in this federation; it has {', '.join(kit.card.sites)}")
    with Line(kit) as line:
        return Run(config, line, observer, wait).follow()


def status(kit: Kit) -> dict[str, Any]:
    """Since when the server is up, when each site was heard of last (None: it is not there), and the jobs under way.

    Raises:
        FlapsamError: the server does not answer.
    """
    with _answered(kit) as line:
        info = line.ask(lambda session: session.get_system_info())
        there = {client.name: client.last_connect_time for client in info.client_info or []}
        return {
            "server": kit.card.server,
            "since": _moment(info.server_info.start_time),
            "sites": {site: _moment(there[site]) if site in there else None for site in kit.card.sites},
            "jobs": [job.job_id for job in info.job_info or []],
        }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def stop(kit: Kit) -> list[str]:
    """End all jobs under way; what is done is kept, and their runs can be gone on with. Returns the jobs.

    Raises:
        FlapsamError: the server does not answer.
    """
    with _answered(kit) as line:
        info = line.ask(lambda session: session.get_system_info())
        running = [job.job_id for job in info.job_info or []]
        waiting = [job["job_id"] for job in line.ask(lambda session: session.list_jobs()) if job["status"] == "SUBMITTED"]
        for job in [*running, *waiting]:
            line.ask(lambda session, job=job: session.abort_job(job))
        return [*running, *waiting]


@contextlib.contextmanager
def _answered(kit: Kit) -> Iterator[Line]:
    try:
        with Line(kit) as line:
            yield line
    except Unreachable as error:
        raise FlapsamError(f"the server at {kit.card.server} does not answer: {error}") from error


def job_name(run: str) -> str:
    """Of all jobs of a run."""
    return f"flapsam-{run[:12]}"


def write_job(folder: Path, run: str, output: Path, sites: Sequence[str], min_sites: int) -> Path:
    """A job is configuration only: it names a class of the installed package for the server, and one for the sites.

    Args:
        folder: where to write it.
        run: the run's id.
        output: the run's folder at the server. No site is told of it.
        sites: that take part.
        min_sites: below which the job does not begin.
    """
    controller = {"path": f"{PACKAGE}.controller.FlapsamController", "args": {"folder": str(output.absolute())}}
    executor = {"path": f"{PACKAGE}.executor.FlapsamExecutor", "args": {}}
    parts = {
        "meta.json": {
            "name": job_name(run),
            "resource_spec": {},
            "min_clients": min(min_sites, len(sites)),
            "deploy_map": {"server": ["server"], "site": list(sites)},
        },
        "server/config/config_fed_server.json": {
            "format_version": 2,
            "server": {"task_request_interval": 0.1},
            "workflows": [{"id": "flapsam", **controller}],
            "components": [],
        },
        "site/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": ["join", "fit", "validate"], "executor": executor}],
            "components": [],
        },
    }
    definition = folder / job_name(run)
    for name, tree in parts.items():
        path = definition / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=1))
    return definition
