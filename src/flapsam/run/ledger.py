"""``events.jsonl``: what happened in a run, one JSON object per line, appended as it happens.

Every kind of event has its own frozen model, so that readers of the ledger work with fields instead of keys.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
)

from flapsam.base.errors import FlapsamError
from flapsam.base.files import private, write_text
from flapsam.base.names import Name, as_name
from flapsam.run.config import Absent, Mode
from flapsam.run.site_scores import SiteScores


@dataclass(frozen=True)
class Cohort:
    """Those who train one model together: all sites, one site alone, or one client with the pooled data.

    In the ledger its name is ``federated``, ``local/SITE`` or ``centralised``. ``personal/SITE`` stands for the adapter that
    a site keeps for its own use after the federation, and ``ensemble`` for all that trained alone, whose predictions are
    averaged.
    """

    mode: Mode | Literal["personal"]
    site: str | None = None
    """The site that trains alone or keeps the adapter, in modes ``local`` and ``personal``."""

    def __str__(self) -> str:
        return self.mode if self.site is None else f"{self.mode}/{self.site}"

    @classmethod
    def parse(cls, name: str) -> "Cohort":
        """The cohort with this name in the ledger.

        Raises:
            ValueError: the name is not that of a cohort.
        """
        mode, slash, site = name.partition("/")
        if mode in ("local", "personal") and slash and site:
            return cls(mode, as_name(site))
        if mode in ("federated", "ensemble", "centralised") and not slash:
            return cls(mode)
        raise ValueError(f"'{name}' is not a cohort; expected federated, ensemble, centralised, local/SITE or personal/SITE")


TOGETHER = Cohort("federated")
"""The cohort of all sites of a run."""
DROPPED = "events-dropped.jsonl"
"""File beside the ledger with the events of rounds that a run dropped when it went back."""


def _cohort(value: Any) -> Any:
    return _parsed(value) if isinstance(value, str) else value


@lru_cache(maxsize=4096)
def _parsed(name: str) -> Cohort:
    """The cohort with this name, which is in nearly every line of a ledger."""
    return Cohort.parse(name)


CohortName = Annotated[Cohort, BeforeValidator(_cohort), PlainSerializer(str)]
Moment = Annotated[datetime, PlainSerializer(lambda moment: moment.isoformat(timespec="seconds"))]
Cases = dict[str, int]
"""Split → number of cases."""


def now() -> datetime:
    """The current time in UTC, as the ledger records it."""
    return datetime.now(UTC)


class EventBase(BaseModel):
    """One line of a ledger. Fields that a later version added are ignored."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, arbitrary_types_allowed=True)

    event: str
    time: Moment = Field(default_factory=lambda: now().replace(microsecond=0))

    repeats: ClassVar[bool] = False
    """Whether the same event may occur again. A resumed run writes events of other kinds only once."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Values that distinguish this event from others: its kind, cohort, round, site and case, as far as it has them."""
        return (self.event, *(getattr(self, field, None) for field in ("cohort", "round", "site", "case")))

    def as_json(self) -> dict[str, Any]:
        """The event as the ledger stores it: its kind, its time and every field that was set."""
        fields = self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"event", "time"})
        return {"event": self.event, "time": self.model_dump(mode="json", include={"time"})["time"], **fields}


class CohortEvent(EventBase):
    """An event of one cohort's training or test."""

    cohort: CohortName = Field(validation_alias="federation", serialization_alias="federation")


class RoundEvent(CohortEvent):
    """An event of one round."""

    round: int


class SiteJoined(EventBase):
    """A site takes part, with a number of cases in each split."""

    event: Literal["site"] = "site"
    site: Name
    cases: Cases


class MicroBatchChosen(EventBase):
    """``micro_batch: auto`` has been replaced by a measured number of windows."""

    event: Literal["micro_batch"] = "micro_batch"
    windows: int


class JobStarted(CohortEvent):
    """Between hospitals: an engine's job has begun, with the sites that are connected."""

    event: Literal["job"] = "job"
    job: str
    sites: list[Name]

    repeats = True


class JobEnded(CohortEvent):
    """Between hospitals: an engine's job has ended."""

    event: Literal["job_end"] = "job_end"
    job: str
    outcome: Literal["done", "regroup", "stopped", "aborted"]
    reason: str = ""

    repeats = True


class SiteExcluded(CohortEvent):
    """A site does not take part."""

    event: Literal["excluded"] = "excluded"
    site: Name
    reason: str

    repeats = True


class CountBounded(CohortEvent):
    """Between hospitals: a site claims so many slices or cases that only a part of them counts in the mean."""

    event: Literal["bounded"] = "bounded"
    site: str
    unit: Literal["slices", "cases"]
    claimed: int
    counted: int

    repeats = True


class FalseSitesBorne(CohortEvent):
    """How many sites may send anything without moving the result beyond what the other sites sent."""

    event: Literal["borne"] = "borne"
    aggregator: str
    sites: int
    """Number of sites that take part."""
    borne: int
    """Number of false sites among them that the aggregator bears in a round that all sites answer."""
    least: int
    """Least number of answers with which a round is closed."""
    borne_of_least: int
    """Number of false sites that the aggregator bears in a round with this many answers."""

    repeats = True


class WentBack(RoundEvent):
    """The run went back to the state before a round. The events of the rounds from then on are in another file."""

    event: Literal["went_back"] = "went_back"

    repeats = True


class Fitted(RoundEvent):
    """A site has answered a round with its packet. Metrics that it does not report are None."""

    event: Literal["fit"] = "fit"
    site: Name
    bytes_down: int
    bytes_up: int
    slices: int
    loss: float | None = None
    cross_entropy: float | None = None
    dice_loss: float | None = None
    steps: float | None = None
    seconds: float | None = None
    """Seconds that the fit itself took."""
    waiting: float | None = None
    """Seconds of the fit in which the network waited for slices."""
    site_seconds: float | None = None
    """Seconds from the request to the answer, where the engine measures them."""


class Summed(RoundEvent):
    """The server has learned the sum of the sites' changes by secure aggregation."""

    event: Literal["summed"] = "summed"
    sites: list[Name]
    """The sites in the sum."""
    bytes_up: int
    """Bytes of the sites' messages for it, without their masked changes."""
    bytes_down: int


class Validated(RoundEvent):
    """A site has scored a round's model on its validation cases."""

    event: Literal["validation"] = "validation"
    site: Name
    dice: dict[str, float | None]
    """Class → Dice, and ``mean`` over the classes."""


class RoundClosed(RoundEvent):
    """The server has aggregated a round's answers."""

    event: Literal["round"] = "round"
    seconds: float
    aggregation_seconds: float


class AnswerRefused(RoundEvent):
    """The server has refused a site's packet. The round continues without it."""

    event: Literal["refused"] = "refused"
    site: Name
    reason: str
    bytes_up: int = 0

    repeats = True


class AnswerLeftOut(RoundEvent):
    """A site's packet was valid, but the server has left it out of the round, because it would have spoilt the result."""

    event: Literal["left_out"] = "left_out"
    site: str
    reason: str

    repeats = True


class AnswerMissing(RoundEvent):
    """A site has not answered a request."""

    event: Literal["missing"] = "missing"
    site: Name
    reason: str
    work: Literal["fit", "agree", "validate", "own", "test"] = "fit"

    repeats = True


class AnswerAwaited(RoundEvent):
    """A site has not answered a request for long, and is still waited for."""

    event: Literal["awaited"] = "awaited"
    site: Name
    work: Literal["join", "fit", "agree", "validate", "own", "test"] = "fit"
    seconds: float
    """Seconds since the request."""
    left: float | None
    """Seconds until the run continues without the site; None if the site is required."""
    share: float | None
    """The site's share of all training cases, if it is known."""

    repeats = True


class Delivered(RoundEvent):
    """A site has received the result of the last round."""

    event: Literal["delivery"] = "delivery"
    site: Name
    bytes_down: int


class OwnAdapterKept(RoundEvent):
    """After the last round, a site has chosen the adapter that it keeps for its own use."""

    event: Literal["kept"] = "kept"
    site: Name
    kept: str
    """The chosen candidate."""
    dice: dict[str, float | None]
    """Candidate → its mean Dice on the site's validation cases."""


class CaseTested(CohortEvent):
    """A test case has been scored."""

    event: Literal["test"] = "test"
    site: Name
    case: Name
    dice: dict[str, float | None]
    """Class or region → Dice."""
    hd95: dict[str, float | None]
    """Class or region → 95 % Hausdorff distance in mm."""
    surface_dice: dict[str, float | None] = {}
    surface_distance: dict[str, float | None] = {}
    volume_error: dict[str, float | None] = {}
    lesion_f1: dict[str, float | None] = {}
    means: dict[str, float | None] = {}
    """Name of a mean → its Dice."""
    outcome: dict[str, str | None] = {}
    """Class or region → whether it is in both label maps, ``missed``, ``spurious`` or ``absent``."""
    regions: list[str] = []
    """Names among these that are regions, which are not part of the mean over the classes."""
    subject: str = ""
    """The patient; the case itself if empty. Earlier versions wrote none of the fields from ``surface_dice`` on."""
    absent: Absent = "one"
    """Dice of a class that is in neither the truth nor the prediction. Earlier versions did not write it, and counted 1."""

    @property
    def elsewhere(self) -> bool:
        """Whether the adapter is one that another site keeps for its own use."""
        return self.cohort.mode == "personal" and self.cohort.site != self.site


class SiteTested(RoundEvent):
    """Between hospitals, a site has scored a round's model on its test cases."""

    event: Literal["site_test"] = "site_test"
    site: Name
    scores: SiteScores | None
    """None if the site keeps its scores to itself, or has too few patients to tell any."""
    bytes_down: int = 0


class RunEnded(EventBase):
    """The run is complete."""

    event: Literal["end"] = "end"


class LabelMapWritten(EventBase):
    """``predict`` has written the label map of an image. These events are in a separate ledger."""

    event: Literal["label_map"] = "label_map"
    case: str
    """Path of the label map in the output folder, without suffix."""
    image: str
    files: list[list[Any]] = Field(validation_alias="of", serialization_alias="of")
    """Name, size and modification time of each of the image's files."""
    method: str = Field(validation_alias="way", serialization_alias="way")
    """SHA-256 of everything that label maps depend on apart from the images."""
    written: list[str]
    """Paths of the written files in the output folder, the label map first."""
    ml: dict[str, float]
    """Class → volume in millilitres."""
    confidence: dict[str, Any] | None = None
    """How much the label map can be trusted, if it was judged."""

    repeats = True


Trouble = AnswerRefused | AnswerLeftOut | AnswerMissing | SiteExcluded
"""Events that say, with a reason, why a site does not count in a round or does not take part in the run."""
Event = Annotated[
    SiteJoined
    | MicroBatchChosen
    | JobStarted
    | JobEnded
    | SiteExcluded
    | CountBounded
    | FalseSitesBorne
    | WentBack
    | Fitted
    | Summed
    | Validated
    | RoundClosed
    | AnswerRefused
    | AnswerLeftOut
    | AnswerMissing
    | AnswerAwaited
    | Delivered
    | OwnAdapterKept
    | CaseTested
    | SiteTested
    | RunEnded
    | LabelMapWritten,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class Ledger:
    """Appends events to a file, and knows the events that the file holds."""

    def __init__(self, path: Path, on_event: Callable[[Event], object] = lambda _: None) -> None:
        """Open a ledger, and remove a last line that a crash cut short.

        Args:
            path: the ledger's file.
            on_event: called with every event that is written.

        Raises:
            FlapsamError: the file cannot be read or written.
        """
        self.path = path
        self.on_event = on_event
        self._events: list[Event] = []
        try:
            if path.exists():
                whole = path.read_bytes()
                os.truncate(path, whole.rfind(b"\n") + 1)
                self._events = read_ledger(path)
            path.touch(0o600)
        except OSError as error:
            raise FlapsamError(f"{path}: cannot write the ledger ({error.strerror})") from error
        self._known = {event.identity for event in self._events}

    def events(self) -> list[Event]:
        """All events so far, the oldest first."""
        return list(self._events)

    def holds(self, event: Event) -> bool:
        """Whether an event with the same identity was written before."""
        return event.identity in self._known

    def write(self, event: Event) -> None:
        """Append an event, unless it was written before and its kind never repeats.

        Raises:
            FlapsamError: the event cannot be written. The ledger is as before.
        """
        if self.holds(event) and not event.repeats:
            return
        before = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8", opener=private) as file:
                file.write(_line(event))
        except OSError as error:
            # A full disk may have taken a part of the line, and the next line must not be appended to that part.
            os.truncate(self.path, before)
            raise FlapsamError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self._events.append(event)
        self._known.add(event.identity)
        self.on_event(event)

    def go_back(self, cohort: Cohort, number: int) -> None:
        """Move every event that a repetition of the rounds from ``number`` on will write again to ``events-dropped.jsonl``.

        Args:
            cohort: the cohort whose rounds are repeated.
            number: the first round that is repeated.
        """
        with self.path.with_name(DROPPED).open("a", encoding="utf-8") as file:
            file.writelines(_line(event) for event in self._events if _is_repeated(event, cohort, number))
        self._events = [event for event in self._events if not _is_repeated(event, cohort, number)]
        write_text(self.path, "".join(map(_line, self._events)))
        self._known = {event.identity for event in self._events}
        self.write(WentBack(cohort=cohort, round=number))


def _is_repeated(event: Event, cohort: Cohort, number: int) -> bool:
    """Whether a repetition of a cohort's rounds from ``number`` on writes this event again."""
    if isinstance(event, RunEnded):
        return True
    if not isinstance(event, CohortEvent) or isinstance(event, WentBack):
        return False
    # The adapters that sites keep follow from the federated rounds.
    if event.cohort != cohort and not (event.cohort.mode == "personal" and cohort == TOGETHER):
        return False
    if isinstance(event, Validated):
        # A site scores a round's result when it answers the next round.
        return event.round >= number - 1
    return isinstance(event, Delivered | CaseTested) or (isinstance(event, RoundEvent) and event.round >= number)


def _line(event: Event) -> str:
    return json.dumps(event.as_json()) + "\n"


def bytes_sent(events: Iterable[Event], cohort: Cohort) -> tuple[int, int]:
    """Bytes up and bytes down of all packets of a cohort, including refused packets and the delivery of the result."""
    own = [event for event in events if isinstance(event, CohortEvent) and event.cohort == cohort]
    up = sum(event.bytes_up for event in own if isinstance(event, Fitted | AnswerRefused | Summed))
    down = sum(event.bytes_down for event in own if isinstance(event, Fitted | Delivered | SiteTested | Summed))
    return up, down


@dataclass(frozen=True)
class NearlyFinal:
    """What a federation needed until it was close to its end."""

    rounds: int
    bytes_a_site: float
    """Bytes up and down of a site, on average, until it had the result of these rounds."""


def nearly_final(events: Iterable[Event], share: float = 0.95) -> NearlyFinal | None:
    """The first validated round whose mean validation Dice over the sites is at least ``share`` of the last one's.

    Args:
        events: the ledger of a run.
        share: part of the final Dice.

    Returns:
        The rounds and bytes until then, or None if fewer than two rounds were validated or the last one's Dice is 0.
    """
    own = [event for event in events if isinstance(event, CohortEvent) and event.cohort == TOGETHER]
    dices: dict[int, list[float]] = {}
    for event in own:
        if isinstance(event, Validated) and (value := event.dice.get("mean")) is not None:
            dices.setdefault(event.round, []).append(value)
    means = {number: sum(values) / len(values) for number, values in sorted(dices.items())}
    final = means[max(means)] if means else 0.0
    if len(means) < 2 or final == 0:
        return None
    rounds = next(number for number, value in means.items() if value >= share * final)
    fits = [event for event in own if isinstance(event, Fitted)]
    up = sum(event.bytes_up for event in own if isinstance(event, Fitted | Summed) and event.round <= rounds)
    # What a round changes comes down with the next one, or is delivered after the last one.
    down = sum(event.bytes_down for event in own if isinstance(event, Fitted) and event.round <= rounds + 1)
    down += sum(event.bytes_down for event in own if isinstance(event, Delivered | Summed) and event.round <= rounds)
    return NearlyFinal(rounds, (up + down) / len({event.site for event in fits}))


def read_ledger(path: Path) -> list[Event]:
    """Read all events of a ledger.

    Args:
        path: the ledger's file.

    Raises:
        FlapsamError: the file is missing or damaged.
    """
    try:
        return parse_events(path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise FlapsamError(f"{path}: there is no ledger here; is this the folder of a run?") from error
    except ValueError as error:
        raise FlapsamError(f"{path}: the ledger is damaged") from error


class LedgerReader:
    """Reads a ledger that another process writes, and each time only what has been added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.inode: int | None = None

    def added(self) -> list[Event] | None:
        """The events since the last time. None if the file has been replaced, because its run went back.

        Raises:
            FlapsamError: the file is damaged or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if self.inode not in (None, inode):
                    return None
                self.inode = inode
                file.seek(self.offset)
                added = file.read()
            # Another process may still be writing the last line.
            added = added[: added.rfind(b"\n") + 1]
            self.offset += len(added)
            return parse_events(added.decode().splitlines())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FlapsamError(f"{self.path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise FlapsamError(f"{self.path}: the ledger is damaged") from error


def parse_events(lines: Iterable[str]) -> list[Event]:
    """Parse the lines of a ledger as events.

    Raises:
        ValueError: a line is not an event.
    """
    return [_EVENT.validate_json(line) for line in lines]
