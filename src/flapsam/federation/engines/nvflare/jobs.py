"""Coordinate a run: submit it, follow it, submit it again after a crash or when a site returns, and stop it."""

import contextlib
import io
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

from flapsam.base.errors import FlapsamError
from flapsam.base.files import alone
from flapsam.federation.engines.nvflare.definition import job_name, write_job
from flapsam.federation.engines.nvflare.executor import REGROUP
from flapsam.federation.engines.nvflare.kits import ADMINISTRATOR, Kit, read_kit
from flapsam.federation.hospitals.handshake import GONE
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import (
    TOGETHER,
    AnswerMissing,
    Event,
    Fitted,
    JobEnded,
    JobStarted,
    LedgerReader,
    RoundClosed,
    RunEnded,
    SiteExcluded,
)
from flapsam.run.observer import Observer

Result = TypeVar("Result")
ATTEMPTS = 3
"""Number of jobs in a row that may fail without completing a round."""
WAIT_SECONDS = 60.0
"""Seconds to wait for missing sites. After that, a run starts as soon as enough are connected."""
POLL_SECONDS = 1.0
"""Seconds between two requests to the server."""
ENDED = ("FINISHED", "ABANDONED", "FAILED")
"""Prefixes of NVFLARE's status of a job that is over."""


class Unreachable(Exception):  # noqa: N818 (the server may come back)
    """The server does not answer."""


class AdminLine:
    """The coordinator's connection to the server. It reconnects after a failure."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        # NVFLARE's own log messages are hidden, because errors are reported here in other words.
        logging.getLogger().addHandler(logging.NullHandler())
        self.session: Session | None = None

    def __enter__(self) -> "AdminLine":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def ask(self, question: Callable[[Session], Result]) -> Result:
        """Send the server a request.

        Args:
            question: calls a method of NVFLARE's session.

        Returns:
            What the session returned.

        Raises:
            Unreachable: the server does not answer.
            FlapsamError: the server refuses the request.
        """
        # NVFLARE prints its progress, which would disturb the output.
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                if self.session is None:
                    self.session = new_secure_session(ADMINISTRATOR, str(self.kit.folder), timeout=5.0)
                return question(self.session)
            except (AuthenticationError, AuthorizationError, InvalidJobDefinition) as error:
                self._drop()
                raise FlapsamError(f"the server at {self.kit.card.server} refused the request: {error}") from error
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
    """One NVFLARE job of a run. A run takes several if sites return or the server restarts."""

    identity: str
    """NVFLARE's id of the job."""
    sites: list[str]
    """Sites that the job was submitted for."""
    started: Any
    """Start time of the server that runs the job. It changes if the server restarts."""
    regrouped: bool = False
    """Whether the job has been asked to end after the current round."""


@dataclass
class RunFollower:
    """Follows a run to its end."""

    config: RunConfig
    admin: AdminLine
    observer: Observer
    wait: float
    """Seconds to wait for missing sites. After that, the run starts as soon as enough are connected."""
    events: list[Event] = field(default_factory=list)
    """All events of the ledger so far."""

    def __post_init__(self) -> None:
        """Begin at the ledger's first event."""
        self.ledger = LedgerReader(self._folder.ledger)

    def follow(self) -> Path:
        """Submit jobs until the run is complete.

        Returns:
            The adapter's folder.

        Raises:
            FlapsamError: the run cannot be completed.
        """
        folder = self._folder
        if folder.is_begun:
            self._check_same_sites(folder)
        run = folder.resume(self.config) if folder.is_begun else folder.begin(self.config)
        self.observer.opened(self.config, [])
        self._read_ledger()
        self.observer.begin(str(TOGETHER), self.config.rounds.count, self._rounds())
        failures = 0
        job = self._attach(run)
        while not self._done():
            if job is None:
                job = self._submit(run)
            before = self._rounds()
            outcome = self._watch(job)
            failures = 0 if self._rounds() > before or outcome == "regroup" or self._is_away(job) else failures + 1
            if failures >= ATTEMPTS:
                end = self._end_of(job)
                reason = f": {end.reason}" if end and end.reason else ""
                advice = "see the server's log, then run the same command to resume"
                raise FlapsamError(f"the run is making no progress{reason}; {advice}")
            job = None
        self.observer.end()
        return folder.adapter(TOGETHER)

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.config.output)

    def _submit(self, run: str) -> Job:
        """Submit a new job for the sites that are connected."""
        sites = self._wait_for_sites()
        with tempfile.TemporaryDirectory() as folder:
            definition = write_job(Path(folder), run, self.config.output, sites, self.config.rounds.min_sites)
            identity = self._patiently(lambda session: session.submit_job(str(definition)))
        info = self._patiently(lambda session: session.get_system_info())
        return Job(identity, sites, info.server_info.start_time)

    def _attach(self, run: str) -> Job | None:
        """Find the job of this run that is already running, if any."""
        job = self._running(run)
        if job is not None:
            job.sites = [site for event in self._started(job) for site in event.sites]
        return job

    def _running(self, run: str) -> Job | None:
        """The job of this run that is already running, if any, without its sites."""
        info = self._patiently(lambda session: session.get_system_info())
        for running in info.job_info:
            meta = self._patiently(lambda session, job=running.job_id: session.get_job_meta(job))
            if meta.get("name") == job_name(run):
                return Job(running.job_id, [], info.server_info.start_time)
        return None

    def _check_same_sites(self, folder: RunFolder) -> None:
        """Check that a job that is already running waits for the sites that it is now to wait for."""
        before, rounds = folder.read_config().rounds, self.config.rounds
        if (sorted(before.named), before.enough) == (sorted(rounds.named), rounds.enough):
            return
        if self._running(folder.read_environment()["run"]):
            raise FlapsamError(
                f"{folder.path}: the run's job began with another rounds.require and keeps to it; run flapsam federation "
                "stop, then the same command again"
            )

    def _watch(self, job: Job) -> str:
        """Report events until a job is over, and end it early when a site has returned.

        Returns:
            The outcome of the job as in ``JobEnded``, or "crashed" if it left none.
        """
        last_asked = 0.0
        while True:
            time.sleep(0.2)
            self._read_ledger()
            if (end := self._end_of(job)) is not None:
                if end.outcome == "aborted" and self._was_stopped(job):
                    raise FlapsamError("the run was stopped; run the same command to resume")
                return end.outcome
            if time.monotonic() - last_asked < POLL_SECONDS:
                continue
            try:
                info = self.admin.ask(lambda session: session.get_system_info())
                meta = self.admin.ask(lambda session: session.get_job_meta(job.identity))
            except Unreachable:
                self.observer.say("The server does not answer. Waiting for it.")
                info = self._patiently(lambda session: session.get_system_info())
                meta = self._patiently(lambda session: session.get_job_meta(job.identity))
            last_asked = time.monotonic()
            if info.server_info.start_time != job.started:
                self.observer.say("The server was restarted. The run resumes from its last complete round.")
                return "crashed"
            if str(meta.get("status", "")).startswith(ENDED):
                self._read_ledger()
                if self._end_of(job) is None:
                    self.observer.say(f"The job ended without a result ({meta['status']}). Submitting it again.")
                    return "crashed"
                continue
            self._regroup_if_back(job, [client.name for client in info.client_info or []])

    def _end_of(self, job: Job) -> JobEnded | None:
        """The event that a job ended with, or None if it has not."""
        return next((e for e in self.events if isinstance(e, JobEnded) and e.job == job.identity), None)

    def _is_away(self, job: Job) -> bool:
        """Whether a site was gone in a job and is not back yet, so that the next job waits for it. That is no failure."""
        events = self._since_start(job)
        gone = {e.site for e in events if isinstance(e, AnswerMissing | SiteExcluded) and e.reason == GONE}
        for started in self._started(job):
            gone |= set(self.config.rounds.named) - set(started.sites)
        connected = set(self._connected())
        away = gone - connected
        return bool(away & set(self.config.rounds.named)) or (bool(away) and len(connected) < self.config.rounds.enough)

    def _was_stopped(self, job: Job) -> bool:
        """Whether a job was stopped by somebody, and not by a crash of its server."""
        while True:
            info = self._patiently(lambda session: session.get_system_info())
            meta = self._patiently(lambda session: session.get_job_meta(job.identity))
            if info.server_info.start_time != job.started:
                return False
            if str(meta.get("status", "")).startswith(ENDED):
                return "ABORTED" in meta["status"]
            time.sleep(POLL_SECONDS)

    def _regroup_if_back(self, job: Job, connected: Sequence[str]) -> None:
        """Ask a job to end after the current round if a connected site could take part again."""
        silent, excluded = set[str](), set[str]()
        events = self._since_start(job)
        for event in events:
            if isinstance(event, AnswerMissing) and event.reason == GONE:
                silent.add(event.site)
            elif isinstance(event, Fitted):
                silent.discard(event.site)
            elif isinstance(event, SiteExcluded):
                (silent if event.reason == GONE else excluded).add(event.site)
        back = [site for site in self._chosen(connected) if site in silent or site not in job.sites]
        back = [site for site in back if site not in excluded]
        # Before the job has started there is nothing to end.
        if back and not job.regrouped and events:
            with contextlib.suppress(Unreachable):
                self.admin.ask(lambda session: session.do_app_command(job.identity, REGROUP, {}))
                job.regrouped = True
                self.observer.say(f"{', '.join(back)}: connected, will take part after this round.")

    def _started(self, job: Job) -> list[JobStarted]:
        """The event that a job started with, in a list, which is empty before."""
        return [e for e in self.events if isinstance(e, JobStarted) and e.job == job.identity][:1]

    def _since_start(self, job: Job) -> list[Event]:
        """The events since a job started; none before."""
        started = self._started(job)
        return self.events[self.events.index(started[0]) :] if started else []

    def _connected(self) -> list[str]:
        """Names of the run's sites that are connected, sorted."""
        info = self._patiently(lambda session: session.get_system_info())
        return sorted(self._chosen([client.name for client in info.client_info or []]))

    def _wait_for_sites(self) -> list[str]:
        """Wait for the sites of the next job.

        Returns:
            All sites of the run, or after ``wait`` seconds those that are connected, as soon as they are enough and none is
            missing that is required.
        """
        chosen = self._chosen(self.admin.kit.card.sites)
        reported: list[str] = []
        since, began = time.monotonic(), datetime.now().astimezone()
        while True:
            connected = self._connected()
            missing = sorted(set(chosen) - set(connected))
            required = [site for site in missing if site in self.config.rounds.named]
            enough = not required and len(connected) >= self.config.rounds.enough
            if not missing or (enough and time.monotonic() - since > self.wait):
                return connected
            if missing != reported:
                self.observer.say(f"Waiting for {', '.join(missing)}.{self._advice(required, enough, began)}")
                reported = missing
            time.sleep(POLL_SECONDS)

    def _advice(self, required: Sequence[str], enough: bool, began: datetime) -> str:
        """What follows if missing sites stay away."""
        if enough:
            return f" The run starts without them {self.wait:g} s after it began to wait."
        if not required:
            return f" The run needs {self.config.rounds.enough} sites."
        since = began.strftime("%H:%M")
        return (
            f" Since {since}, the run waits for {', '.join(required)} (rounds.require). To continue without them, press "
            "Ctrl-C and run the same command with --set rounds.require=… (a number or names)."
        )

    def _chosen(self, names: Sequence[str]) -> list[str]:
        """The given sites that the run's configuration includes."""
        sites = self.config.data.sites
        return [name for name in names if sites is None or name in sites]

    def _patiently(self, question: Callable[[Session], Result]) -> Result:
        """Repeat a request until the server answers."""
        reported = False
        while True:
            try:
                return self.admin.ask(question)
            except Unreachable as error:
                if not reported:
                    self.observer.say(f"No answer from the server at {self.admin.kit.card.server}: {error}. Retrying.")
                    reported = True
                time.sleep(POLL_SECONDS)

    def _read_ledger(self) -> None:
        seen, added = len(self.events), self.ledger.added()
        if added is None:
            self.ledger, self.events = LedgerReader(self._folder.ledger), []
            added = self.ledger.added()
        self.events += added or []
        for event in self.events[seen:]:
            self.observer.event(event)
            if isinstance(event, RoundClosed):
                self.observer.step()

    def _rounds(self) -> int:
        """Number of completed rounds."""
        return sum(isinstance(event, RoundClosed) for event in self.events)

    def _done(self) -> bool:
        return any(isinstance(event, RunEnded) for event in self.events)


def with_names(config: RunConfig, sites: Sequence[str]) -> RunConfig:
    """The configuration with the names of all its sites in the place of ``rounds.require: all``.

    Args:
        config: the configuration.
        sites: the sites of the federation.

    Raises:
        FlapsamError: a required site is not among the run's, or more sites are required than there are.
    """
    chosen, rounds = sorted(config.data.sites or sites), config.rounds
    names = chosen if rounds.require == "all" else sorted(rounds.named)
    if unknown := [site for site in names if site not in chosen]:
        raise FlapsamError(f"rounds.require: {unknown[0]} is not a site of this run; its sites are {', '.join(chosen)}")
    if isinstance(rounds.require, int) and rounds.require > len(chosen):
        raise FlapsamError(f"rounds.require: {rounds.require} sites are required, and the run has {len(chosen)}; lower it")
    return config.model_copy(update={"rounds": rounds.model_copy(update={"require": names})}) if names else config


def run(
    config: RunConfig, kit: Path, observer: Observer, *, wait: float = WAIT_SECONDS, from_round: int | None = None
) -> Path:
    """Start a run, or resume the one in its folder, and follow it to its end.

    Args:
        config: configuration of the run. Each site sets its own data paths.
        kit: folder of the coordinator's kit.
        observer: follows the run.
        wait: seconds to wait for missing sites. After that, the run starts as soon as enough are connected.
        from_round: resume the run from before this round, and drop everything since.

    Returns:
        The adapter's folder.

    Raises:
        FlapsamError: the kit or the configuration is invalid, the run was stopped, or it makes no progress.
    """
    # Imported here, because it takes seconds to load and the other commands do not need it.
    from flapsam.federation.borne import check_borne
    from flapsam.federation.going_back import go_back
    from flapsam.federation.preparation import resolve

    coordinator = read_kit(kit, "coordinator")
    config = resolve(config)
    unknown = sorted(set(config.data.sites or []) - set(coordinator.card.sites))
    if unknown:
        sites = ", ".join(coordinator.card.sites)
        raise FlapsamError(f"data.sites: unknown site '{unknown[0]}'; the sites of this federation are {sites}")
    config = with_names(config, coordinator.card.sites)
    if config.rounds.count:
        check_borne(config, len(config.data.sites or coordinator.card.sites))
    if from_round is not None:
        folder = RunFolder(config.output)
        # Before anything is written: a job of this run may be running.
        with alone(folder.lock, wait=False):
            folder.resume(config)
            go_back(folder, from_round)
    with AdminLine(coordinator) as admin:
        return RunFollower(config, admin, observer, wait).follow()


def evaluate(
    adapters: Sequence[Path], config: RunConfig, kit: Path, observer: Observer, *, wait: float = WAIT_SECONDS
) -> Path:
    """Have the sites score adapters on their own test cases, or resume the evaluation in its folder.

    Args:
        adapters: folders of runs or adapters.
        config: the configuration, from ``evaluation_of``.
        kit: folder of the coordinator's kit.
        observer: follows the evaluation.
        wait: seconds to wait for missing sites.

    Returns:
        The evaluation's folder.

    Raises:
        FlapsamError: as for ``run``.
    """
    from flapsam.federation.hospitals.evaluation import begin
    from flapsam.federation.preparation import resolve

    config = resolve(config)
    begin(adapters, config)
    run(config, kit, observer, wait=wait)
    return config.output


def status(kit: Path) -> dict[str, Any]:
    """Ask the server for the state of the federation.

    Args:
        kit: folder of the coordinator's kit.

    Returns:
        The server's address and start time, each site's last contact (None: not connected), and the running jobs.

    Raises:
        FlapsamError: the server does not answer.
    """
    with _connection(kit) as admin:
        info = admin.ask(lambda session: session.get_system_info())
        card = admin.kit.card
        connected = {client.name: client.last_connect_time for client in info.client_info or []}
        return {
            "server": card.server,
            "since": _moment(info.server_info.start_time),
            "sites": {site: _moment(connected[site]) if site in connected else None for site in card.sites},
            "jobs": [job.job_id for job in info.job_info or []],
        }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def stop(kit: Path) -> list[str]:
    """Stop all jobs, running and waiting. Finished rounds are kept, and the runs can be resumed.

    Args:
        kit: folder of the coordinator's kit.

    Returns:
        The ids of the stopped jobs.

    Raises:
        FlapsamError: the server does not answer.
    """
    with _connection(kit) as admin:
        info = admin.ask(lambda session: session.get_system_info())
        running = [job.job_id for job in info.job_info or []]
        waiting = [job["job_id"] for job in admin.ask(lambda session: session.list_jobs()) if job["status"] == "SUBMITTED"]
        for job in [*running, *waiting]:
            admin.ask(lambda session, job=job: session.abort_job(job))
        return [*running, *waiting]


@contextlib.contextmanager
def _connection(folder: Path) -> Iterator[AdminLine]:
    """Connect with a coordinator's kit. A server that does not answer is an error."""
    kit = read_kit(folder, "coordinator")
    try:
        with AdminLine(kit) as admin:
            yield admin
    except Unreachable as error:
        raise FlapsamError(f"the server at {kit.card.server} does not answer: {error}") from error
