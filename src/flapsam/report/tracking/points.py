"""Conversion of a ledger's events to points of curves."""

from collections.abc import Iterator
from dataclasses import dataclass

from flapsam.learning.metrics import CaseScores, by_site, scores_of, summarise
from flapsam.report.standing import CohortStanding, Standing
from flapsam.run.config import RunConfig
from flapsam.run.ledger import (
    TOGETHER,
    CaseTested,
    Cohort,
    CohortEvent,
    Delivered,
    Event,
    Fitted,
    RoundClosed,
    RunEnded,
    Validated,
)

FIT = ("loss", "cross_entropy", "dice_loss", "seconds", "site_seconds", "waiting")
"""Fields of a fit that become curves."""
ROUND = ("seconds", "aggregation_seconds")
"""Fields of a closed round that become curves."""

Value = tuple[str, str, int, float | None]
"""Series, name, round and value, which may be None."""


@dataclass(frozen=True)
class Point:
    """One value of one curve."""

    series: str
    """Owner of the curve: a cohort (``federated``) or one of its sites (``federated/site_a``)."""
    name: str
    """Name of the value, such as ``loss`` or ``validation_dice/kidney``."""
    step: int
    """The round."""
    value: float
    time: float
    """Seconds since 1970."""


class Points:
    """Converts events to points, including sums and means over sites. No curve gets two points for one round."""

    def __init__(self, config: RunConfig) -> None:
        self.standing = Standing(config)
        self.written: set[tuple[Cohort, int]] = set()
        """Cohorts and rounds whose mean validation Dice is already written."""
        self.tests: dict[Cohort, list[CaseScores]] = {}
        """Cohort → scores of its test cases."""

    def of(self, event: Event) -> list[Point]:
        """The points that the next event adds."""
        before = self.standing.under_way
        self.standing.add(event)
        time = event.time.timestamp()
        values = self._values(event, before)
        return [Point(series, name, step, float(value), time) for series, name, step, value in values if value is not None]

    def _values(self, event: Event, before: CohortStanding | None) -> Iterator[Value]:
        if isinstance(event, CaseTested) and not event.elsewhere:
            self.tests.setdefault(event.cohort, []).append(scores_of(event))
        if isinstance(event, CohortEvent) and event.cohort in self.standing.cohorts:
            yield from self._of_cohort(self.standing.cohorts[event.cohort], event)
        # The Dice of a cohort's last round may only be complete once the next cohort has begun.
        for standing in filter(None, (before, self.standing.under_way)):
            for number, dice in standing.dice.items():
                if (standing.cohort, number) not in self.written:
                    self.written.add((standing.cohort, number))
                    yield str(standing.cohort), "validation_dice/mean", number, dice
        if isinstance(event, RunEnded):
            yield from self._at_the_end()

    def _of_cohort(self, standing: CohortStanding, event: CohortEvent) -> Iterator[Value]:
        cohort = str(standing.cohort)
        travels = standing.cohort.mode == "federated"
        match event:
            case Fitted():
                site = f"{cohort}/{event.site}"
                yield from ((site, name, event.round, getattr(event, name)) for name in FIT)
                if travels:
                    yield from ((site, name, event.round, getattr(event, name)) for name in ("bytes_up", "bytes_down"))
            case Delivered() if travels:
                # The final model is delivered after the last round, so its bytes count as those of the next one.
                yield f"{cohort}/{event.site}", "bytes_down", event.round + 1, event.bytes_down
            case Validated():
                for name, value in event.dice.items():
                    yield f"{cohort}/{event.site}", f"validation_dice/{name}", event.round, value
            case RoundClosed():
                yield from ((cohort, name, event.round, getattr(event, name)) for name in ROUND)
                if travels:
                    yield cohort, "bytes_up_so_far", event.round, standing.bytes_up
                    yield cohort, "bytes_down_so_far", event.round, standing.bytes_down

    def _at_the_end(self) -> Iterator[Value]:
        """Test Dice by site and pooled, at the last round, and all bytes including the delivery, one round later."""
        for cohort, scores in self.tests.items():
            step = self.standing.cohorts[TOGETHER if cohort.mode == "personal" else cohort].rounds
            sites = {f"{cohort}/{site}": part for site, part in by_site(scores).items()}
            for series, part in {str(cohort): scores, **sites}.items():
                summary = summarise(part)
                for name, value in {"mean": summary.mean_dice, **summary.dice}.items():
                    yield series, f"test_dice/{name}", step, value
        for standing in self.standing.of_mode("federated"):
            yield str(standing.cohort), "bytes_up_so_far", standing.rounds + 1, standing.bytes_up
            yield str(standing.cohort), "bytes_down_so_far", standing.rounds + 1, standing.bytes_down
