"""Where a run stands: figures from its configuration and its ledger, for whoever shows them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

from flapsam.config import Mode, RunConfig
from flapsam.federation.ledger import Event

RECENT = 5
"""Rounds, or fits of a site, whose middle says how long the next will take."""
TROUBLE = ("refused", "missing", "excluded")
"""Events of a site that does not count in a round, or takes no part; each says why."""
IN_A_ROUND = ("fit", "validation", "refused", "missing")
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
    trouble: Event | None = None
    """What kept it from its last round, if it did not answer that."""


@dataclass
class FederationStanding:
    """Those who train one model together, or one that trains alone."""

    name: str
    mode: Mode
    planned: int
    """Rounds, at most."""
    members: list[str]
    rounds: int = 0
    """That are done."""
    over: bool = False
    """Whether no round will follow; it may have settled before all that were planned."""
    told: bool = False
    """Whether no validation will follow, either."""
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
            if known and (number < self.rounds or self.told or len(scores) >= self._telling(number)):
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
        self.cases: dict[str, dict[str, int]] = {}
        """Site → split → cases, of the sites that train."""
        self.federations: dict[str, FederationStanding] = {}
        """In the order of the run; those of sites that are not known yet are missing."""
        self.under_way: FederationStanding | None = None
        """The one that the newest event of a federation is of."""
        self.trouble: dict[str, list[Event]] = {kind: [] for kind in TROUBLE}
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
        kind = event["event"]
        self.first, self.last = self.first or event, event
        if kind == "site":
            self.cases[event["site"]] = event["cases"]
            self._plan()
        elif kind in TROUBLE:
            self.trouble[kind].append(event)
        elif kind in ("job", "job_end"):
            self.stopped = event.get("reason", "")
        elif kind == "end":
            self.ended = True
            for one in self.federations.values():
                one.over = one.told = True
                one.settle()
        if "federation" in event:
            self._of_federation(kind, event)
        if kind not in IN_A_ROUND or self._since is None:
            self._since = moment(event)

    @property
    def bytes_up(self) -> int:
        """That travelled. What a site alone, or the pooled data's only client, sends to itself is no traffic."""
        return sum(one.bytes_up for one in self.federations.values() if one.mode == "federated")

    @property
    def bytes_down(self) -> int:
        """As ``bytes_up``."""
        return sum(one.bytes_down for one in self.federations.values() if one.mode == "federated")

    def of_mode(self, mode: Mode) -> list[FederationStanding]:
        """Its federations: one, or one a site."""
        return [one for one in self.federations.values() if one.mode == mode]

    def seconds_left(self, now: datetime) -> float | None:
        """An estimate for all rounds that are left, without the test at the end; None before it can be made.

        A federation under way goes on as in its last rounds; one that has not begun takes as long as its sites' fits took
        elsewhere, one after another.
        """
        if self.ended:
            return 0.0
        total = 0.0 if self.federations else None
        for one in self.federations.values():
            seconds = 0.0 if one.over else self._seconds_left(one, now)
            if total is None or seconds is None:
                return None
            total += seconds
        return total

    def round_seconds_left(self, now: datetime) -> float | None:
        """Of the round under way, by the rounds before."""
        one = self.under_way
        typical = one.round_seconds if one else None
        if typical is None or self._since is None:
            return None
        return max(0.0, typical - (now - self._since).total_seconds())

    def as_json(self, now: datetime) -> dict[str, Any]:
        """The figures for other programs."""
        return {
            "begun": self.first["time"] if self.first else None,
            "ended": self.ended,
            "stopped": self.stopped or None,
            "last_event": self.last,
            "seconds_since": (now - moment(self.last)).total_seconds() if self.last else None,
            "seconds_left": self.seconds_left(now),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "cases": self.cases,
            **{kind: {"count": len(events), "last": next(reversed(events), None)} for kind, events in self.trouble.items()},
            "federations": {
                name: {
                    "mode": one.mode,
                    "rounds": one.rounds,
                    "planned": one.planned,
                    "over": one.over,
                    "round_seconds": one.round_seconds,
                    "dice": one.dice,
                    "best_round": one.best[0] if one.best else None,
                    "bytes_up": one.bytes_up,
                    "bytes_down": one.bytes_down,
                    "tested": one.tested,
                    "sites": {
                        site.name: {"round": site.round, "dice": site.dice, "loss": site.loss, "seconds": site.seconds}
                        for site in one.sites.values()
                    },
                }
                for name, one in self.federations.items()
            },
        }

    def _of_federation(self, kind: str, event: Event) -> None:
        one = self.federations.get(event["federation"]) or self._plan_one(event["federation"])
        if one is not self.under_way:
            if self.under_way is not None:
                self.under_way.over = self.under_way.told = True
                self.under_way.settle()
            self.under_way = one
        one.bytes_up += event.get("bytes_up", 0)
        one.bytes_down += event.get("bytes_down", 0)
        if kind == "round":
            one.rounds = event["round"]
            one.over = one.rounds >= one.planned
            one.seconds.append(event["seconds"])
        elif kind == "validation":
            one.validation.setdefault(event["round"], {})[event["site"]] = one.site(event["site"]).dice = event["dice"][
                "mean"
            ]
        elif kind == "fit":
            site = one.site(event["site"])
            site.round, site.loss, site.trouble = event["round"], event.get("loss"), None
            site.seconds = event.get("seconds") or event.get("site_seconds")
            if site.seconds is not None:
                self._fits[site.name] = [*self._fits.get(site.name, [])[1 - RECENT :], site.seconds]
        elif kind in TROUBLE:
            one.site(event["site"]).trouble = event
        elif kind == "delivery":
            one.over = one.site(event["site"]).delivered = True
        elif kind == "test":
            one.over = one.told = True
            one.tested += 1
        one.settle()

    def _seconds_left(self, one: FederationStanding, now: datetime) -> float | None:
        rounds = one.planned - one.rounds
        typical = one.round_seconds
        if typical is None:
            typical = self._seconds_elsewhere(one.members)
        if typical is None:
            return None
        spent = (now - self._since).total_seconds() if one is self.under_way and self._since else 0.0
        return rounds * typical - min(max(spent, 0.0), typical)

    def _seconds_elsewhere(self, members: Sequence[str]) -> float | None:
        """What the newest fits of these sites took wherever they were, one after another; None while some are not known."""
        known = [median(self._fits[name]) for name in members if name in self._fits]
        return sum(known) if members and len(known) == len(members) else None

    def _plan(self) -> None:
        """All federations of the run, as far as sites are known; what is known of them stays."""
        known, self.federations = self.federations, {}
        sites = sorted(self.cases)
        for mode in self.config.modes:
            for name in [f"{mode}/{site}" for site in sites] if mode == "local" else [mode]:
                one = self.federations[name] = known.get(name) or FederationStanding(
                    name, mode, self.config.rounds.count, []
                )
                one.members = [name.partition("/")[2]] if mode == "local" else sites
                if mode != "centralised":
                    for site in one.members:
                        one.site(site)

    def _plan_one(self, name: str) -> FederationStanding:
        """A federation whose site the ledger has not named before."""
        mode: Any = name.partition("/")[0]
        one = FederationStanding(name, mode, self.config.rounds.count, [name.partition("/")[2]] if "/" in name else [])
        return self.federations.setdefault(name, one)


def moment(event: Event) -> datetime:
    """When it was written."""
    return datetime.fromisoformat(event["time"])


def now() -> datetime:
    """The time, as ledgers have it."""
    return datetime.now(UTC)
