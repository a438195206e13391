"""Events of a ledger as points of curves."""

from collections.abc import Iterator
from dataclasses import dataclass

from flapsam.config import RunConfig
from flapsam.federation.ledger import Event, scores_in
from flapsam.metrics import CaseScores, by_site, summarise
from flapsam.report.standing import FederationStanding, Standing, moment

FIT = ("loss", "cross_entropy", "dice_loss", "seconds", "site_seconds", "waiting")
"""Fields of a fit that are curves."""
ROUND = ("seconds", "aggregation_seconds")
"""Fields of a round that are."""

Value = tuple[str, str, int, float | None]
"""Series, name, round and value, if there is one."""


@dataclass(frozen=True)
class Point:
    """One value of one curve."""

    series: str
    """Whose: a federation's (``federated``) or a site's in it (``federated/site_a``)."""
    name: str
    """What: ``loss``, ``validation_dice/kidney`` …"""
    step: int
    """The round."""
    value: float
    time: float
    """Seconds since 1970."""


class Points:
    """Turns events into points; sums and means over sites are made here. No curve gets two points of one round."""

    def __init__(self, config: RunConfig) -> None:
        self.standing = Standing(config)
        self.told: set[tuple[str, int]] = set()
        """Federation and round whose mean validation Dice is written."""
        self.tests: dict[str, list[CaseScores]] = {}
        """Federation → its test cases."""

    def of(self, event: Event) -> list[Point]:
        """The points that the next event adds."""
        before = self.standing.under_way
        self.standing.add(event)
        time = moment(event).timestamp()
        values = self._values(event, before)
        return [Point(series, name, step, float(value), time) for series, name, step, value in values if value is not None]

    def _values(self, event: Event, before: FederationStanding | None) -> Iterator[Value]:
        kind = event["event"]
        one = self.standing.federations.get(event.get("federation", ""))
        if one is not None:
            yield from self._of_federation(one, kind, event)
        # The Dice of a last round may be complete only when something else has begun.
        for other in filter(None, (before, self.standing.under_way)):
            for number, dice in other.dice.items():
                if (other.name, number) not in self.told:
                    self.told.add((other.name, number))
                    yield other.name, "validation_dice/mean", number, dice
        if kind == "end":
            yield from self._at_the_end()

    def _of_federation(self, one: FederationStanding, kind: str, event: Event) -> Iterator[Value]:
        site = f"{one.name}/{event['site']}" if "site" in event else one.name
        travels = one.mode == "federated"
        if kind == "fit":
            yield from ((site, name, event["round"], event.get(name)) for name in FIT)
            if travels:
                yield from ((site, name, event["round"], event[name]) for name in ("bytes_up", "bytes_down"))
        elif kind == "delivery" and travels:
            # What would begin one more round.
            yield site, "bytes_down", event["round"] + 1, event["bytes_down"]
        elif kind == "validation":
            yield from ((site, f"validation_dice/{name}", event["round"], value) for name, value in event["dice"].items())
        elif kind == "round":
            yield from ((one.name, name, event["round"], event[name]) for name in ROUND)
            if travels:
                yield one.name, "bytes_up_so_far", event["round"], one.bytes_up
                yield one.name, "bytes_down_so_far", event["round"], one.bytes_down
        elif kind == "test":
            self.tests.setdefault(one.name, []).append(scores_in(event))

    def _at_the_end(self) -> Iterator[Value]:
        """Test Dice by site and pooled, at the last round; and all bytes, with those of the delivery."""
        for name, scores in self.tests.items():
            step = self.standing.federations[name].rounds
            for series, part in {name: scores, **{f"{name}/{site}": own for site, own in by_site(scores).items()}}.items():
                summary = summarise(part)
                for what, value in {"mean": summary.mean_dice, **summary.dice}.items():
                    yield series, f"test_dice/{what}", step, value
        for one in self.standing.of_mode("federated"):
            yield one.name, "bytes_up_so_far", one.rounds + 1, one.bytes_up
            yield one.name, "bytes_down_so_far", one.rounds + 1, one.bytes_down
