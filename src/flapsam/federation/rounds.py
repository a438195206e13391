"""Round after round, whatever the engine: packets out, answers in, aggregation, and an event in the ledger for each."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flapsam.base.errors import FlapsamError
from flapsam.federation.agreement import VALIDATION
from flapsam.federation.packets import PacketRefused
from flapsam.federation.server import Server
from flapsam.learning.training import FIT_METRICS
from flapsam.run.config import Rounds
from flapsam.run.ledger import AnswerMissing, AnswerRefused, Cohort, Delivered, Event, Fitted, RoundClosed, Validated

Work = Literal["fit", "validate"]
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Answer:
    """What came back from a site."""

    site: str
    bytes_down: int
    """Size of the packets that the site received."""
    fitted: bytes | memoryview = b""
    """The site's packet, if it was asked for a fit."""
    scores: Scores | None = None
    """Its validation scores, if it was asked to validate."""
    missing: str = ""
    """Why there is neither."""
    seconds: float | None = None
    """Seconds that the site took, if its engine measures them."""


Carry = Callable[[Work], Iterable[Answer]]
"""An engine: it takes every site its packets and yields the answers as they come, each once."""
Record = Callable[[Event], object]
"""Writes an event to the ledger."""


def rounds(server: Server, cohort: Cohort, options: Rounds, carry: Carry, record: Record) -> Iterator[int]:
    """Run the rounds that are left until all are done or validation has settled.

    Args:
        server: at its start or in the middle of a run.
        cohort: who trains together, for the ledger.
        options: how many rounds there are, and when they end early.
        carry: the engine.
        record: writes an event to the ledger.

    Yields:
        The number of rounds done, after each round.

    Raises:
        FlapsamError: fewer sites than ``options.min_sites`` answered. The round counts as not begun.
    """
    while server.rounds_done < options.count and not settled(server.validation, options.patience, options.settled):
        number = server.rounds_done + 1
        started = time.perf_counter()
        for answer in carry("fit"):
            if answer.missing:
                record(AnswerMissing(cohort=cohort, round=number, site=answer.site, reason=answer.missing))
            else:
                _receive(server, cohort, number, answer, record)
        aggregating = time.perf_counter()
        answered = len(server.state.replied())
        if answered < options.min_sites:
            reason = f"{answered} sites answered, rounds.min_sites is {options.min_sites}; the ledger has the reasons"
            raise FlapsamError(f"round {number}: {reason}")
        server.close_round()
        closed = time.perf_counter()
        record(RoundClosed(cohort=cohort, round=number, seconds=closed - started, aggregation_seconds=closed - aggregating))
        yield number


def deliver(server: Server, cohort: Cohort, carry: Carry, record: Record) -> None:
    """Send the result of the last round to the sites and record how it scores there.

    Args:
        server: after its last round.
        cohort: who trained together.
        carry: the engine.
        record: writes an event to the ledger.
    """
    number = server.rounds_done
    for answer in carry("validate"):
        if answer.missing:
            record(AnswerMissing(cohort=cohort, round=number, site=answer.site, work="validate", reason=answer.missing))
        else:
            _record_validation(cohort, number, answer.site, answer.scores or {}, record)
            record(Delivered(cohort=cohort, round=number, site=answer.site, bytes_down=answer.bytes_down))


def settled(validation: Sequence[float | None], patience: int | None, gain: float) -> bool:
    """Whether validation Dice has stopped rising.

    It has if the best of the last ``patience`` values is not above the best before them by more than ``gain``.

    Args:
        validation: mean Dice of each validation, oldest first; None where there was none.
        patience: number of validations to look back on; None: validation never settles.
        gain: a rise in Dice that counts as progress.
    """
    known = [value for value in validation if value is not None]
    return patience is not None and len(known) > patience and max(known[-patience:]) <= max(known[:-patience]) + gain


def _receive(server: Server, cohort: Cohort, number: int, answer: Answer, record: Record) -> None:
    site, size = answer.site, len(answer.fitted)
    try:
        header = server.receive(answer.fitted, site)
    except PacketRefused as reason:
        record(AnswerRefused(cohort=cohort, round=number, site=site, reason=str(reason), bytes_up=size))
        return
    _record_validation(cohort, number - 1, site, header.metrics, record)
    reported: dict[str, Any] = {name: header.metrics.get(name) for name in FIT_METRICS}
    if answer.seconds is not None:
        reported["site_seconds"] = answer.seconds
    reported |= {"bytes_down": answer.bytes_down, "bytes_up": size, "slices": header.samples}
    record(Fitted(cohort=cohort, round=number, site=site, **reported))


def _record_validation(cohort: Cohort, number: int, site: str, metrics: Scores, record: Record) -> None:
    scores = {name.removeprefix(VALIDATION): value for name, value in metrics.items() if name.startswith(VALIDATION)}
    if "mean" in scores:
        record(Validated(cohort=cohort, round=number, site=site, dice=scores))
