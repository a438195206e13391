"""The rounds of a run, whatever the engine: packets out, answers in, aggregation, and an event in the ledger for each."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median_high
from typing import Any, Literal

from flapsam.base.errors import FlapsamError
from flapsam.federation.agreement import VALIDATION
from flapsam.federation.packets import PacketRefused
from flapsam.federation.reported import is_amount, read_scores
from flapsam.federation.server import Server
from flapsam.learning.training import FIT_METRICS
from flapsam.run.config import Rounds
from flapsam.run.ledger import (
    AnswerLeftOut,
    AnswerMissing,
    AnswerRefused,
    Cohort,
    Delivered,
    Event,
    Fitted,
    RoundClosed,
    SiteTested,
    Summed,
    Validated,
)
from flapsam.run.site_scores import SiteScores

Work = Literal["fit", "agree", "validate", "own", "test"]
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Answer:
    """What came back from a site, or why nothing did."""

    site: str
    bytes_down: int
    """Size in bytes of the packets that the site received."""
    fitted: bytes | memoryview = b""
    """The site's packet, if it was asked to fit, or its message, if it was asked to agree."""
    scores: Scores | None = None
    """Its validation scores, if it was asked to validate."""
    tested: SiteScores | None = None
    """Its test scores, if it was asked to test and tells them."""
    missing: str = ""
    """Reason why there is neither a packet nor scores."""
    seconds: float | None = None
    """Seconds that the site took, if its engine measures them."""


Carry = Callable[[Work], Iterable[Answer]]
"""An engine: it brings every site its packets and yields each answer once, as it arrives."""
Record = Callable[[Event], object]
"""Writes an event to the ledger."""
REFUSALS = 3
"""Number of refused answers of a site in a round after which its further answers are dropped, unread and unrecorded."""


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
        FlapsamError: fewer usable answers than ``options.min_sites`` arrived, or none of a site in ``options.require``. The
            round is not closed and has to be run again.
    """
    while server.rounds_done < options.count and not settled(server.validation, options.patience, options.settled):
        number = server.rounds_done + 1
        started = time.perf_counter()
        up, down = 0, 0

        def leave_out(site: str, reason: str, number: int = number) -> None:
            record(AnswerLeftOut(cohort=cohort, round=number, site=site, reason=reason))

        for step in server.steps():
            sent, received = _step(server, cohort, number, "fit" if step == "fit" else "agree", carry, record)
            up, down = up + sent, down + received
            answered = server.state.replied()
            if step == "fit":
                _check_answered(server, number, answered, options)
            server.end_step(leave_out)
        aggregating = time.perf_counter()
        server.close_round(options.min_sites, leave_out)
        closed = time.perf_counter()
        if server.collector is not None:
            sites = server.collector.summed
            record(Summed(cohort=cohort, round=number, sites=sites, bytes_up=up, bytes_down=down))
        record(RoundClosed(cohort=cohort, round=number, seconds=closed - started, aggregation_seconds=closed - aggregating))
        yield number


def _check_answered(server: Server, number: int, answered: Collection[str], options: Rounds) -> None:
    """Check that all sites have answered without which a round is not closed."""
    lacking = [site for site in options.named if site not in answered and server.shares.get(site, 0) > 0]
    if lacking:
        raise FlapsamError(
            f"round {number}: there is no usable answer of {', '.join(lacking)}, required by rounds.require; see the ledger "
            "for the reasons"
        )
    if len(answered) < options.enough:
        field = "rounds.min_sites" if options.enough == options.min_sites else "rounds.require"
        few = f"too few sites answered: {len(answered)} of at least {options.enough} ({field})"
        raise FlapsamError(f"round {number}: {few}; see the ledger for the reasons")


def _step(server: Server, cohort: Cohort, number: int, work: Work, carry: Carry, record: Record) -> tuple[int, int]:
    """Carry out one step of a round. Returns the bytes up and down of its messages, without those of fits."""
    refused: Counter[str] = Counter()
    missing: set[str] = set()
    up = down = 0
    for answer in carry(work):
        site = answer.site
        if work == "agree":
            up, down = up + len(answer.fitted), down + answer.bytes_down
        if answer.missing and site not in missing:
            missing.add(site)
            record(AnswerMissing(cohort=cohort, round=number, site=site, work=work, reason=answer.missing))
        elif not answer.missing and refused[site] < REFUSALS:
            refused[site] += not (_receive if work == "fit" else _take)(server, cohort, number, answer, record)
    return up, down


def deliver(server: Server, cohort: Cohort, carry: Carry, record: Record) -> None:
    """Send the result of the last round to the sites and record its validation scores.

    Args:
        server: the server, after its last round.
        cohort: the clients that trained together.
        carry: the engine.
        record: writes an event to the ledger.
    """
    number = server.rounds_done
    for answer in _first_answers(server, carry, "validate"):
        site, missing = answer.site, answer.missing
        try:
            scores = read_scores(answer.scores or {}, server.classes)
        except ValueError as error:
            scores, missing = {}, missing or str(error)
        if missing:
            record(AnswerMissing(cohort=cohort, round=number, site=site, work="validate", reason=missing))
        else:
            _record_validation(cohort, number, site, scores, record)
            record(Delivered(cohort=cohort, round=number, site=site, bytes_down=answer.bytes_down))


def keep_own(server: Server, cohort: Cohort, carry: Carry, record: Record) -> None:
    """Have every site choose the adapter that it keeps for its own use. Its answer says no more than that it has done so.

    Args:
        server: the server, after its last round.
        cohort: the clients that trained together.
        carry: the engine.
        record: writes an event to the ledger.
    """
    missing: set[str] = set()
    for answer in carry("own"):
        if answer.missing and answer.site in server.shares and answer.site not in missing:
            missing.add(answer.site)
            reason = answer.missing
            record(AnswerMissing(cohort=cohort, round=server.rounds_done, site=answer.site, work="own", reason=reason))


def test(server: Server, cohort: Cohort, carry: Carry, record: Record) -> None:
    """Have the sites score the result of the last round on their test cases.

    Args:
        server: the server, after its last round.
        cohort: the clients that trained together.
        carry: the engine. It asks only sites that have not answered before.
        record: writes an event to the ledger.
    """
    number = server.rounds_done
    for answer in _first_answers(server, carry, "test"):
        site = answer.site
        if answer.missing:
            record(AnswerMissing(cohort=cohort, round=number, site=site, work="test", reason=answer.missing))
        else:
            record(SiteTested(cohort=cohort, round=number, site=site, scores=answer.tested, bytes_down=answer.bytes_down))


def _first_answers(server: Server, carry: Carry, work: Work) -> Iterator[Answer]:
    """The first answer of each site of the run."""
    answered: set[str] = set()
    for answer in carry(work):
        if answer.site in server.shares and answer.site not in answered:
            answered.add(answer.site)
            yield answer


def settled(validation: Sequence[Mapping[str, float | None]], patience: int | None, gain: float) -> bool:
    """Whether validation Dice has stopped rising at more than half of the sites that report it.

    At a site it has if the best of its last ``patience`` values exceeds its best value before them by at most ``gain``. Each
    site is judged by its own values, and then the median over the sites is taken. The median of the values themselves would
    not do, because a site that reports 1 and then 0 can move it from the best honest site's curve to the worst one's.

    Args:
        validation: mean Dice by site in each validation, oldest first. None where a site reported none.
        patience: number of validations to look back on. None: validation never settles.
        gain: largest rise in Dice that does not yet count as progress.
    """
    if patience is None:
        return False
    rises = []
    for site in {site for scores in validation for site in scores}:
        known = [value for scores in validation if (value := scores.get(site)) is not None]
        if len(known) > patience:
            rises.append(max(known[-patience:]) - max(known[:-patience]))
        elif known:
            rises.append(inf)
    # Of an even number, the upper one, because a run ends by itself at the last round, but must not be ended too soon.
    return bool(rises) and median_high(rises) <= gain


def _receive(server: Server, cohort: Cohort, number: int, answer: Answer, record: Record) -> bool:
    """Pass an answer on to the server. Returns whether it was accepted."""
    site, size = answer.site, len(answer.fitted)
    try:
        if not is_amount(answer.seconds):
            raise PacketRefused("the seconds that came with it are invalid")
        header = server.receive(answer.fitted, site)
    except PacketRefused as refusal:
        record(AnswerRefused(cohort=cohort, round=number, site=site, reason=str(refusal), bytes_up=size))
        return False
    _record_validation(cohort, number - 1, site, header.metrics, record)
    reported: dict[str, Any] = {name: header.metrics.get(name) for name in FIT_METRICS}
    if answer.seconds is not None:
        reported["site_seconds"] = answer.seconds
    reported |= {"bytes_down": answer.bytes_down, "bytes_up": size, "slices": header.samples}
    record(Fitted(cohort=cohort, round=number, site=site, **reported))
    return True


def _take(server: Server, cohort: Cohort, number: int, answer: Answer, record: Record) -> bool:
    """Pass a message of secure aggregation on to the server. Returns whether it was accepted."""
    assert server.collector is not None
    try:
        server.collector.take(answer.site, bytes(answer.fitted))
    except PacketRefused as refusal:
        record(AnswerRefused(cohort=cohort, round=number, site=answer.site, reason=str(refusal)))
        return False
    return True


def _record_validation(cohort: Cohort, number: int, site: str, metrics: Scores, record: Record) -> None:
    scores = {name.removeprefix(VALIDATION): value for name, value in metrics.items() if name.startswith(VALIDATION)}
    if "mean" in scores:
        record(Validated(cohort=cohort, round=number, site=site, dice=scores))
