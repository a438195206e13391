"""Where a run stands: facts from its configuration and its ledger, without any presentation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean, median
from typing import Any

from flapsam.run.config import Mode, RunConfig
from flapsam.run.ledger import (
    AnswerLeftOut,
    AnswerMissing,
    AnswerRefused,
    Cases,
    CaseTested,
    Cohort,
    CohortEvent,
    Delivered,
    Event,
    Fitted,
    JobEnded,
    JobStarted,
    RoundClosed,
    RunEnded,
    SiteExcluded,
    SiteJoined,
    Trouble,
    Validated,
)

RECENT = 5
"""Number of the newest rounds, or of a site's newest fits, whose median predicts how long the next one takes."""
TROUBLES = ("refused", "left_out", "missing", "excluded")
"""Kinds of ``Trouble``."""
InRound = Fitted | Validated | AnswerRefused | AnswerLeftOut | AnswerMissing
"""Events of the current round."""


@dataclass
class SiteStanding:
    """Where a site stands in one cohort."""

    name: str
    round: int = 0
    """Last round that the site answered; 0 before its first answer."""
    loss: float | None = None
    """Training loss in that round."""
    seconds: float | None = None
    """Seconds of the fit in that round, or from request to answer if the site does not report its metrics."""
    dice: float | None = None
    """Newest validation Dice, the mean over the classes."""
    delivered: bool = False
    """Whether the site has received the result."""
    trouble: Trouble | None = None
    """Why the site dropped out of its last round; None if it answered."""


@dataclass
class CohortStanding:
    """Where a cohort stands."""

    cohort: Cohort
    planned: int
    """Maximum number of rounds."""
    members: list[str]
    """Names of the sites in the cohort."""
    rounds: int = 0
    """Number of rounds that are done."""
    over: bool = False
    """Whether no round will follow. A cohort whose validation has settled ends before its planned rounds."""
    validated: bool = False
    """Whether no validation will follow either."""
    seconds: list[float] = field(default_factory=list)
    """Seconds that every round took."""
    validation: dict[int, dict[str, float | None]] = field(default_factory=dict)
    """Round → site → validation Dice of the round's model, the mean over the classes."""
    dice: dict[int, float] = field(default_factory=dict)
    """Round → validation Dice, the mean over the sites that report theirs, once all of them have."""
    bytes_up: int = 0
    bytes_down: int = 0
    tested: int = 0
    """Number of test cases that have been scored."""
    sites: dict[str, SiteStanding] = field(default_factory=dict)
    """Site → where it stands."""

    def site(self, name: str) -> SiteStanding:
        """Where a site stands. Creates the standing of a site that is new."""
        return self.sites.setdefault(name, SiteStanding(name))

    @property
    def answered(self) -> list[str]:
        """Names of the sites that have answered the current round."""
        return [site.name for site in self.sites.values() if site.round > self.rounds]

    def settle(self) -> None:
        """Compute the mean Dice of every round that all sites have validated."""
        for number in sorted(self.validation.keys() - self.dice.keys()):
            scores = self.validation[number]
            # Sites validate a round's model in the next round, and their scores arrive one after another.
            if number < self.rounds or self.validated or len(scores) >= self._expected(number):
                known = [value for value in scores.values() if value is not None]
                if known:
                    self.dice[number] = fmean(known)

    def _expected(self, number: int) -> int:
        """Number of sites expected to validate a round: as many as the round before, or at first all that answered it."""
        if self.dice:
            return len(self.validation[max(self.dice)])
        return sum(site.round >= number for site in self.sites.values())

    @property
    def newest(self) -> tuple[int, float] | None:
        """The last round with a Dice, and that Dice."""
        return max(self.dice.items(), default=None)

    @property
    def best(self) -> tuple[int, float] | None:
        """The first round with the best Dice, and that Dice."""
        return max(self.dice.items(), key=lambda item: (item[1], -item[0]), default=None)

    @property
    def round_seconds(self) -> float | None:
        """Median seconds of the newest rounds."""
        return median(self.seconds[-RECENT:]) if self.seconds else None


class Standing:
    """Where a run stands after some events of its ledger."""

    def __init__(self, config: RunConfig, events: Iterable[Event] = ()) -> None:
        """Start at the beginning of a run, or after some events.

        Args:
            config: the run's configuration.
            events: the events of its ledger so far, oldest first.
        """
        self.config = config
        self.cases: dict[str, Cases] = {}
        """Site → split → cases, of the sites that train."""
        self.cohorts: dict[Cohort, CohortStanding] = {}
        """The cohorts whose sites are known, in the order of the run."""
        self.under_way: CohortStanding | None = None
        """The cohort of the newest event that belongs to a cohort."""
        self.troubles: dict[str, list[Trouble]] = {kind: [] for kind in TROUBLES}
        self.stopped = ""
        """Reason why the last job between hospitals ended early; empty once the next job starts."""
        self.first: Event | None = None
        self.last: Event | None = None
        self.ended = False
        self._since: datetime | None = None
        """Start of the current round, which is the time of the last event outside a round."""
        self._fits: dict[str, list[float]] = {}
        """Site → seconds of its newest fits, in any cohort."""
        self._plan()
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Update the standing with the next event."""
        self.first, self.last = self.first or event, event
        match event:
            case SiteJoined():
                self.cases[event.site] = event.cases
                self._plan()
            case AnswerRefused() | AnswerLeftOut() | AnswerMissing() | SiteExcluded():
                self.troubles[event.event].append(event)
            case JobStarted():
                self.stopped = ""
            case JobEnded():
                self.stopped = event.reason
            case RunEnded():
                self.ended = True
                for standing in self.cohorts.values():
                    standing.over = standing.validated = True
                    standing.settle()
        if isinstance(event, CohortEvent):
            self._add_to_cohort(event)
        if not isinstance(event, InRound) or self._since is None:
            self._since = event.time

    @property
    def bytes_up(self) -> int:
        """Bytes that sites sent. Only federated cohorts count, because the others have one client on the same machine."""
        return sum(standing.bytes_up for standing in self.of_mode("federated"))

    @property
    def bytes_down(self) -> int:
        """Bytes that sites received, in federated cohorts only."""
        return sum(standing.bytes_down for standing in self.of_mode("federated"))

    def of_mode(self, mode: Mode) -> list[CohortStanding]:
        """The cohorts of a mode: one for each site in mode ``local``, and one otherwise."""
        return [standing for standing in self.cohorts.values() if standing.cohort.mode == mode]

    def seconds_left(self, now: datetime) -> float | None:
        """Estimated seconds of all remaining rounds, without the test at the end; None before an estimate is possible.

        The estimate assumes that a cohort takes as long per round as in its newest rounds, or, before its first round, as
        long as its sites' newest fits in other cohorts, one after another.

        Args:
            now: the current time.
        """
        if self.ended:
            return 0.0
        total = 0.0 if self.cohorts else None
        for standing in self.cohorts.values():
            seconds = 0.0 if standing.over else self._seconds_left(standing, now)
            if total is None or seconds is None:
                return None
            total += seconds
        return total

    def round_seconds_left(self, now: datetime) -> float | None:
        """Estimated seconds that are left of the current round, from the rounds before; None without any.

        Args:
            now: the current time.
        """
        typical = self.under_way.round_seconds if self.under_way else None
        if typical is None or self._since is None:
            return None
        return max(0.0, typical - (now - self._since).total_seconds())

    def as_json(self, now: datetime) -> dict[str, Any]:
        """The standing as JSON, for other programs.

        Args:
            now: the current time.
        """
        last = self.last.as_json() if self.last else None
        return {
            "begun": self.first.as_json()["time"] if self.first else None,
            "ended": self.ended,
            "stopped": self.stopped or None,
            "last_event": last,
            "seconds_since": (now - self.last.time).total_seconds() if self.last else None,
            "seconds_left": self.seconds_left(now),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "cases": self.cases,
            **{
                kind: {"count": len(events), "last": events[-1].as_json() if events else None}
                for kind, events in self.troubles.items()
            },
            "federations": {
                str(cohort): {
                    "mode": cohort.mode,
                    "rounds": standing.rounds,
                    "planned": standing.planned,
                    "over": standing.over,
                    "round_seconds": standing.round_seconds,
                    "dice": standing.dice,
                    "best_round": standing.best[0] if standing.best else None,
                    "bytes_up": standing.bytes_up,
                    "bytes_down": standing.bytes_down,
                    "tested": standing.tested,
                    "sites": {
                        site.name: {"round": site.round, "dice": site.dice, "loss": site.loss, "seconds": site.seconds}
                        for site in standing.sites.values()
                    },
                }
                for cohort, standing in self.cohorts.items()
            },
        }

    def _add_to_cohort(self, event: CohortEvent) -> None:
        if event.cohort.mode in ("personal", "ensemble"):
            # Neither trains anything of its own.
            return
        standing = self.cohorts.get(event.cohort) or self._plan_cohort(event.cohort)
        if standing is not self.under_way:
            if self.under_way is not None:
                self.under_way.over = self.under_way.validated = True
                self.under_way.settle()
            self.under_way = standing
        match event:
            case RoundClosed():
                standing.rounds = event.round
                standing.over = standing.rounds >= standing.planned
                standing.seconds.append(event.seconds)
            case Validated():
                dice = standing.site(event.site).dice = event.dice["mean"]
                standing.validation.setdefault(event.round, {})[event.site] = dice
            case Fitted():
                standing.bytes_up += event.bytes_up
                standing.bytes_down += event.bytes_down
                site = standing.site(event.site)
                site.round, site.loss, site.trouble = event.round, event.loss, None
                site.seconds = event.seconds or event.site_seconds
                if site.seconds is not None:
                    self._fits[site.name] = [*self._fits.get(site.name, [])[1 - RECENT :], site.seconds]
            case AnswerRefused() | AnswerLeftOut() | AnswerMissing() | SiteExcluded():
                standing.bytes_up += event.bytes_up if isinstance(event, AnswerRefused) else 0
                standing.site(event.site).trouble = event
            case Delivered():
                standing.bytes_down += event.bytes_down
                standing.over = standing.site(event.site).delivered = True
            case CaseTested():
                standing.over = standing.validated = True
                standing.tested += 1
        standing.settle()

    def _seconds_left(self, standing: CohortStanding, now: datetime) -> float | None:
        rounds = standing.planned - standing.rounds
        typical = standing.round_seconds
        if typical is None:
            typical = self._seconds_elsewhere(standing.members)
        if typical is None:
            return None
        spent = (now - self._since).total_seconds() if standing is self.under_way and self._since else 0.0
        return rounds * typical - min(max(spent, 0.0), typical)

    def _seconds_elsewhere(self, members: Sequence[str]) -> float | None:
        """Seconds of these sites' newest fits in any cohort, one after another; None if a site has no fit yet."""
        known = [median(self._fits[name]) for name in members if name in self._fits]
        return sum(known) if members and len(known) == len(members) else None

    def _plan(self) -> None:
        """Plan the run's cohorts with the sites that are known so far, and keep the standings that exist."""
        known, self.cohorts = self.cohorts, {}
        sites = sorted(self.cases)
        for mode in self.config.modes:
            if mode == "ensemble":
                continue
            for cohort in [Cohort(mode, site) for site in sites] if mode == "local" else [Cohort(mode)]:
                standing = known.get(cohort) or self._plan_cohort(cohort)
                self.cohorts[cohort] = standing
                standing.members = sites if cohort.site is None else [cohort.site]
                if mode != "centralised":
                    for site in standing.members:
                        standing.site(site)

    def _plan_cohort(self, cohort: Cohort) -> CohortStanding:
        members = [] if cohort.site is None else [cohort.site]
        return self.cohorts.setdefault(cohort, CohortStanding(cohort, self.config.rounds.count, members))
