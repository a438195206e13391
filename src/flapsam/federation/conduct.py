"""From round to round, whatever the engine: packets out, answers in, aggregation, and a line in the ledger for each."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flapsam.config import Rounds
from flapsam.errors import FlapsamError
from flapsam.federation.packets import PacketRefused
from flapsam.federation.rounds import FIT, VALIDATION, Server, settled

Work = Literal["fit", "validate"]
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Answer:
    """What came back from a site."""

    site: str
    bytes_down: int
    """Of the packets that it got."""
    fitted: bytes | memoryview = b""
    """Its packet, if it was asked for a fit."""
    scores: Scores | None = None
    """If it was asked to validate."""
    missing: str = ""
    """Why there is neither."""
    seconds: float | None = None
    """That the site took, if its engine says so."""


Carry = Callable[[Work], Iterable[Answer]]
"""An engine: brings every site its packets, and gives the answers, each once, as they come."""
Record = Callable[..., None]
"""Writes an event of this federation: its name, then its fields."""


def rounds(server: Server, options: Rounds, carry: Carry, record: Record) -> Iterator[int]:
    """Conduct rounds until all are done or validation has settled, going on where the server's state stands.

    Args:
        server: at its start or in the middle of a run.
        options: how many rounds, and when they end.
        carry: the engine.
        record: writes the ledger.

    Yields:
        The number of rounds done, after each.

    Raises:
        FlapsamError: fewer sites than ``options.min_sites`` answered; the round is as if it had not begun.
    """
    while server.rounds_done < options.count and not settled(server.validation, options.patience, options.settled):
        number = server.rounds_done + 1
        started = time.perf_counter()
        for answer in carry("fit"):
            if answer.missing:
                record("missing", round=number, site=answer.site, reason=answer.missing)
            else:
                _receive(server, number, answer, record)
        aggregating = time.perf_counter()
        answered = len(server.state.replied())
        if answered < options.min_sites:
            reason = f"{answered} sites answered, rounds.min_sites is {options.min_sites}; see the ledger for the reasons"
            raise FlapsamError(f"round {number}: {reason}")
        server.close_round()
        now = time.perf_counter()
        record("round", round=number, seconds=now - started, aggregation_seconds=now - aggregating)
        yield number


def deliver(server: Server, carry: Carry, record: Record) -> None:
    """Send what the last round gave, and record how it does at the sites."""
    for answer in carry("validate"):
        if answer.missing:
            record("missing", round=server.rounds_done, site=answer.site, work="validate", reason=answer.missing)
        else:
            _record_validation(server.rounds_done, answer.site, answer.scores or {}, record)
            record("delivery", round=server.rounds_done, site=answer.site, bytes_down=answer.bytes_down)


def _receive(server: Server, number: int, answer: Answer, record: Record) -> None:
    about: dict[str, Any] = {"round": number, "site": answer.site}
    try:
        header = server.receive(answer.fitted, answer.site)
    except PacketRefused as reason:
        record("refused", **about, reason=str(reason), bytes_up=len(answer.fitted))
        return
    _record_validation(number - 1, answer.site, header.metrics, record)
    told = {key: header.metrics.get(key) for key in FIT}
    if answer.seconds is not None:
        told["site_seconds"] = answer.seconds
    traffic = {"bytes_down": answer.bytes_down, "bytes_up": len(answer.fitted)}
    record("fit", **about, **traffic, slices=header.samples, **told)


def _record_validation(number: int, site: str, metrics: Scores, record: Record) -> None:
    scores = {key.removeprefix(VALIDATION): value for key, value in metrics.items() if key.startswith(VALIDATION)}
    if "mean" in scores:
        record("validation", round=number, site=site, dice=scores)
