"""The rounds of a run, whatever the engine: packets out, answers in, aggregation, and an event in the ledger for each."""

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
    """What came back from a site, or why nothing did."""

    site: str
    bytes_down: int
    """Size in bytes of the packets that the site received."""
    fitted: bytes | memoryview = b""
    """The site's packet, if it was asked to fit."""
    scores: Scores | None = None
    """Its validation scores, if it was asked to validate."""
    missing: str = ""
    """Reason why there is neither a packet nor scores."""
    seconds: float | None = None
    """Seconds that the site took, if its engine measures them."""


Carry = Callable[[Work], Iterable[Answer]]
"""An engine: it brings every site its packets and yields each answer once, as it arrives."""
Record = Callable[[Event], object]
"""Writes an event to the ledger."""


def rounds(server: Server, cohort: Cohort, options: Rounds, carry: Carry, record: Record) -> Iterator[int]:
    """Run the remaining rounds until all are done or validation has settled.

    Args:
        server: the server, at the start or in the middle of a run.
        cohort: the clients that train together, for the ledger.
        options: the number of rounds, and when to stop early.
        carry: the engine.
        record: writes an event to the ledger.

    Yields:
        The number of rounds done, after each round.

    Raises:
        FlapsamError: fewer sites than ``options.min_sites`` answered. The round is not closed and has to be run again.
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
            few = f"too few sites answered: {answered} of at least {options.min_sites} (rounds.min_sites)"
            raise FlapsamError(f"round {number}: {few}; see the ledger for the reasons")
        server.close_round()
        closed = time.perf_counter()
        record(RoundClosed(cohort=cohort, round=number, seconds=closed - started, aggregation_seconds=closed - aggregating))
        yield number


def deliver(server: Server, cohort: Cohort, carry: Carry, record: Record) -> None:
    """Send the result of the last round to the sites and record its validation scores.

    Args:
        server: the server, after its last round.
        cohort: the clients that trained together.
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

    It has if the best of the last ``patience`` values exceeds the best value before them by at most ``gain``.

    Args:
        validation: mean Dice of each validation, oldest first. None where there was none.
        patience: number of validations to look back on. None: validation never settles.
        gain: largest rise in Dice that does not yet count as progress.
    """
    known = [value for value in validation if value is not None]
    return patience is not None and len(known) > patience and max(known[-patience:]) <= max(known[:-patience]) + gain


def _receive(server: Server, cohort: Cohort, number: int, answer: Answer, record: Record) -> None:
    site, size = answer.site, len(answer.fitted)
    try:
        header = server.receive(answer.fitted, site)
    except PacketRefused as refusal:
        record(AnswerRefused(cohort=cohort, round=number, site=site, reason=str(refusal), bytes_up=size))
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
