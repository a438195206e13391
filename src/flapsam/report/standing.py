"""Where a run stands: figures from its configuration and its ledger, for whoever shows them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean, median
from typing import Any

from flapsam.run.config import Mode, RunConfig
from flapsam.run.ledger import (
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
"""Rounds, or fits of a site, whose middle says how long the next will take."""
TROUBLES = ("refused", "missing", "excluded")
"""Kinds of ``Trouble``."""
InRound = Fitted | Validated | AnswerRefused | AnswerMissing
"""Events while a round is under way."""


@dataclass
class SiteStanding:
    """A site in one federation."""

    name: str
    round: int = 0
    """That it answered last; 0 before."""
    loss: float | None = None
    """Of that round."""
    seconds: float | None = None
    """That its fit took, or the site altogether where its metrics stay at home."""
    dice: float | None = None
    """Its newest validation Dice, the mean over the classes."""
    delivered: bool = False
    """Whether it has the result."""
    trouble: Trouble | None = None
    """What kept it from its last round, if it did not answer that."""


@dataclass
class CohortStanding:
    """Where a cohort stands."""

    cohort: Cohort
    planned: int
    """Rounds, at most."""
    members: list[str]
    rounds: int = 0
    """That are done."""
    over: bool = False
    """Whether no round will follow; it may have settled before all that were planned."""
    validated: bool = False
    """Whether no validation will follow either."""
    seconds: list[float] = field(default_factory=list)
    """Of every round."""
    validation: dict[int, dict[str, float | None]] = field(default_factory=dict)
    """Round → site → mean Dice of what the round gave."""
    dice: dict[int, float] = field(default_factory=dict)
    """Round → validation Dice, the mean over the sites that tell theirs, once all of them did."""
    bytes_up: int = 0
    bytes_down: int = 0
    tested: int = 0
    """Test cases that are scored."""
    sites: dict[str, SiteStanding] = field(default_factory=dict)

    def site(self, name: str) -> SiteStanding:
        """A site's standing; there is one for every name that the ledger has."""
        return self.sites.setdefault(name, SiteStanding(name))

    @property
    def answered(self) -> list[str]:
        """Sites that have answered the round under way."""
        return [site.name for site in self.sites.values() if site.round > self.rounds]

    def settle(self) -> None:
        """Take in the Dice of rounds of which all has been told."""
        for number in sorted(self.validation.keys() - self.dice.keys()):
            scores = self.validation[number]
            known = [value for value in scores.values() if value is not None]
            # What a round gave is told with the next round's answers, by one site after another.
            if known and (number < self.rounds or self.validated or len(scores) >= self._telling(number)):
                self.dice[number] = fmean(known)

    def _telling(self, number: int) -> int:
        """How many sites are expected to tell what a round gave: as many as before, or at first all that answered it."""
        if self.dice:
            return len(self.validation[max(self.dice)])
        return sum(site.round >= number for site in self.sites.values())

    @property
    def newest(self) -> tuple[int, float] | None:
        """The last round with a Dice, and it."""
        return max(self.dice.items(), default=None)

    @property
    def best(self) -> tuple[int, float] | None:
        """The first round with the best Dice, and it."""
        return max(self.dice.items(), key=lambda item: (item[1], -item[0]), default=None)

    @property
    def round_seconds(self) -> float | None:
        """What a round takes now."""
        return median(self.seconds[-RECENT:]) if self.seconds else None


class Standing:
    """Where a run stands after some events of its ledger."""

    def __init__(self, config: RunConfig, events: Iterable[Event] = ()) -> None:
        """At the beginning of a run, or after these events.

        Args:
            config: of the run.
            events: of its ledger, oldest first.
        """
        self.config = config
        self.cases: dict[str, Cases] = {}
        """Site → split → cases, of the sites that train."""
        self.cohorts: dict[Cohort, CohortStanding] = {}
        """Cohorts in the order of the run, as far as their sites are known."""
        self.under_way: CohortStanding | None = None
        """The cohort of the newest event that has one."""
        self.troubles: dict[str, list[Trouble]] = {kind: [] for kind in TROUBLES}
        self.stopped = ""
        """Why the last job between hospitals ended early, until the next begins."""
        self.first: Event | None = None
        self.last: Event | None = None
        self.ended = False
        self._since: datetime | None = None
        """When the round under way began, or what came before it ended."""
        self._fits: dict[str, list[float]] = {}
        """Site → seconds that its newest fits took, in whatever federation."""
        self._plan()
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.first, self.last = self.first or event, event
        match event:
            case SiteJoined():
                self.cases[event.site] = event.cases
                self._plan()
            case AnswerRefused() | AnswerMissing() | SiteExcluded():
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
        """Bytes that travelled up. What a site alone, or the pooled data's only client, sends to itself is no traffic."""
        return sum(standing.bytes_up for standing in self.of_mode("federated"))

    @property
    def bytes_down(self) -> int:
        """Bytes that travelled down, as ``bytes_up``."""
        return sum(standing.bytes_down for standing in self.of_mode("federated"))

    def of_mode(self, mode: Mode) -> list[CohortStanding]:
        """The cohorts of a mode: one, or one a site."""
        return [standing for standing in self.cohorts.values() if standing.cohort.mode == mode]

    def seconds_left(self, now: datetime) -> float | None:
        """An estimate for all rounds that are left, without the test at the end; None before it can be made.

        A cohort under way is taken to continue as in its last rounds. One that has not begun is taken to need as long as its
        sites' fits took elsewhere, one after another.
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
        """An estimate for the round under way, from the rounds before."""
        typical = self.under_way.round_seconds if self.under_way else None
        if typical is None or self._since is None:
            return None
        return max(0.0, typical - (now - self._since).total_seconds())

    def as_json(self, now: datetime) -> dict[str, Any]:
        """The figures for other programs."""
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
        standing = self.cohorts.get(event.cohort) or self._plan_one(event.cohort)
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
            case AnswerRefused() | AnswerMissing() | SiteExcluded():
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
        """What the newest fits of these sites took in any cohort, one after another; None while some are not known."""
        known = [median(self._fits[name]) for name in members if name in self._fits]
        return sum(known) if members and len(known) == len(members) else None

    def _plan(self) -> None:
        """Plan all cohorts of the run, as far as sites are known. What is known of them stays."""
        known, self.cohorts = self.cohorts, {}
        sites = sorted(self.cases)
        for mode in self.config.modes:
            for cohort in [Cohort(mode, site) for site in sites] if mode == "local" else [Cohort(mode)]:
                standing = known.get(cohort) or self._plan_one(cohort)
                self.cohorts[cohort] = standing
                standing.members = sites if cohort.site is None else [cohort.site]
                if mode != "centralised":
                    for site in standing.members:
                        standing.site(site)

    def _plan_one(self, cohort: Cohort) -> CohortStanding:
        members = [] if cohort.site is None else [cohort.site]
        return self.cohorts.setdefault(cohort, CohortStanding(cohort, self.config.rounds.count, members))
