"""``events.jsonl``: what happened in a run, one JSON object a line, appended as it happens.

Every kind of event is a frozen model of its own, so whoever reads the ledger works with fields and not with keys.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
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
from flapsam.run.config import Mode


@dataclass(frozen=True)
class Cohort:
    """Those who train one model together: all sites, one site alone, or one client with the pooled data.

    In the ledger its name is ``federated``, ``local/SITE`` or ``centralised``.
    """

    mode: Mode
    site: str | None = None
    """The site that trains alone, in mode ``local``."""

    def __str__(self) -> str:
        return self.mode if self.site is None else f"{self.mode}/{self.site}"

    @classmethod
    def parse(cls, name: str) -> "Cohort":
        """The cohort of this name.

        Raises:
            ValueError: no cohort has such a name.
        """
        mode, slash, site = name.partition("/")
        if (mode == "local") != bool(slash and site) or mode not in ("federated", "local", "centralised"):
            raise ValueError(f"'{name}' is no cohort; expected federated, centralised or local/SITE")
        return cls(mode, site or None)


TOGETHER = Cohort("federated")
"""All sites of a run."""


def _cohort(value: Any) -> Any:
    return Cohort.parse(value) if isinstance(value, str) else value


CohortName = Annotated[Cohort, BeforeValidator(_cohort), PlainSerializer(str)]
Moment = Annotated[datetime, PlainSerializer(lambda moment: moment.isoformat(timespec="seconds"))]
Cases = dict[str, int]
"""Split → number of cases."""


def now() -> datetime:
    """The time as the ledger has it: UTC."""
    return datetime.now(UTC)


class EventBase(BaseModel):
    """One line of a ledger. Fields of later versions are ignored."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, arbitrary_types_allowed=True)

    event: str
    time: Moment = Field(default_factory=lambda: now().replace(microsecond=0))

    repeats: ClassVar[bool] = False
    """Whether the same event may occur again. Of other kinds a resumed run writes none twice."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells this event from others: its kind, cohort, round, site and case, as far as it has them."""
        return (self.event, *(getattr(self, field, None) for field in ("cohort", "round", "site", "case")))

    def as_json(self) -> dict[str, Any]:
        """The event as it is written: its kind and time, and every field that was given."""
        fields = self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"event", "time"})
        return {"event": self.event, "time": self.model_dump(mode="json", include={"time"})["time"], **fields}


class CohortEvent(EventBase):
    """An event of one cohort's training or test."""

    cohort: CohortName = Field(validation_alias="federation", serialization_alias="federation")


class RoundEvent(CohortEvent):
    """An event in a round."""

    round: int


class SiteJoined(EventBase):
    """A site takes part with so many cases of each split."""

    event: Literal["site"] = "site"
    site: str
    cases: Cases


class MicroBatchChosen(EventBase):
    """``micro_batch: auto`` has become this number of windows."""

    event: Literal["micro_batch"] = "micro_batch"
    windows: int


class JobStarted(CohortEvent):
    """Between hospitals: an engine's job begins, with the sites that are connected."""

    event: Literal["job"] = "job"
    job: str
    sites: list[str]

    repeats = True


class JobEnded(CohortEvent):
    """Between hospitals: an engine's job is over."""

    event: Literal["job_end"] = "job_end"
    job: str
    outcome: Literal["done", "regroup", "stopped", "aborted"]
    reason: str = ""

    repeats = True


class SiteExcluded(CohortEvent):
    """A site does not take part."""

    event: Literal["excluded"] = "excluded"
    site: str
    reason: str

    repeats = True


class Fitted(RoundEvent):
    """A site has answered a round with its packet. What it does not report is None."""

    event: Literal["fit"] = "fit"
    site: str
    bytes_down: int
    bytes_up: int
    slices: int
    loss: float | None = None
    cross_entropy: float | None = None
    dice_loss: float | None = None
    steps: float | None = None
    seconds: float | None = None
    """Of the fit itself."""
    waiting: float | None = None
    """Seconds of these in which the network waited for slices."""
    site_seconds: float | None = None
    """From the request to the answer, where the engine measures it."""


class Validated(RoundEvent):
    """A site has scored a round's model on its validation cases."""

    event: Literal["validation"] = "validation"
    site: str
    dice: dict[str, float | None]
    """Class → Dice, and ``mean`` over the classes."""


class RoundClosed(RoundEvent):
    """The server has aggregated a round's answers."""

    event: Literal["round"] = "round"
    seconds: float
    aggregation_seconds: float


class AnswerRefused(RoundEvent):
    """A site's packet is refused; the round continues without it."""

    event: Literal["refused"] = "refused"
    site: str
    reason: str
    bytes_up: int = 0

    repeats = True


class AnswerMissing(RoundEvent):
    """A site has not answered."""

    event: Literal["missing"] = "missing"
    site: str
    reason: str
    work: Literal["fit", "validate"] = "fit"

    repeats = True


class Delivered(RoundEvent):
    """A site has received the result of the last round."""

    event: Literal["delivery"] = "delivery"
    site: str
    bytes_down: int


class CaseTested(CohortEvent):
    """A test case is scored."""

    event: Literal["test"] = "test"
    site: str
    case: str
    dice: dict[str, float | None]
    hd95: dict[str, float | None]
    """In mm."""


class RunEnded(EventBase):
    """The run is complete."""

    event: Literal["end"] = "end"


class LabelMapWritten(EventBase):
    """``predict`` has written the label map of an image. These events have a ledger of their own."""

    event: Literal["label_map"] = "label_map"
    case: str
    """Place of the label map in the output folder, without suffix."""
    image: str
    files: list[list[Any]] = Field(validation_alias="of", serialization_alias="of")
    """Name, size and time of each of the image's files."""
    method: str = Field(validation_alias="way", serialization_alias="way")
    """SHA-256 of all that label maps depend on but the images."""
    written: list[str]
    """First the label map."""
    ml: dict[str, float]
    """Class → volume in millilitres."""

    repeats = True


Trouble = AnswerRefused | AnswerMissing | SiteExcluded
"""A site does not count in a round, or takes no part in the run. Each has a reason."""
Event = Annotated[
    SiteJoined
    | MicroBatchChosen
    | JobStarted
    | JobEnded
    | SiteExcluded
    | Fitted
    | Validated
    | RoundClosed
    | AnswerRefused
    | AnswerMissing
    | Delivered
    | CaseTested
    | RunEnded
    | LabelMapWritten,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class Ledger:
    """Appends events to a file and knows those that it holds."""

    def __init__(self, path: Path, on_event: Callable[[Event], object] = lambda _: None) -> None:
        """Open a ledger. A last line that a crash cut short is removed.

        Args:
            path: the file.
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
            path.touch()
        except OSError as error:
            raise FlapsamError(f"{path}: cannot write the ledger ({error.strerror})") from error
        self._known = {event.identity for event in self._events}

    def events(self) -> list[Event]:
        """All events so far, oldest first."""
        return list(self._events)

    def holds(self, event: Event) -> bool:
        """Whether an event with this identity was written before."""
        return event.identity in self._known

    def write(self, event: Event) -> None:
        """Append an event, unless it is of a kind that never repeats and was written before."""
        if self.holds(event) and not event.repeats:
            return
        before = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event.as_json()) + "\n")
        except OSError:
            # A full disk may take a part of the line; the next one must not be appended to that.
            os.truncate(self.path, before)
            raise
        self._events.append(event)
        self._known.add(event.identity)
        self.on_event(event)


def bytes_sent(events: Iterable[Event], cohort: Cohort) -> tuple[int, int]:
    """Bytes up and down of all packets of a cohort, refused ones and the delivery of the result included."""
    own = [event for event in events if isinstance(event, CohortEvent) and event.cohort == cohort]
    up = sum(event.bytes_up for event in own if isinstance(event, Fitted | AnswerRefused))
    down = sum(event.bytes_down for event in own if isinstance(event, Fitted | Delivered))
    return up, down


def read_ledger(path: Path, *, whole_lines: bool = False) -> list[Event]:
    """All events of a ledger.

    Args:
        path: the file.
        whole_lines: leave out a last line that is not whole, because another process is writing it.

    Raises:
        FlapsamError: the file is missing or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return parse_events((text[: text.rfind("\n") + 1] if whole_lines else text).splitlines())
    except OSError as error:
        raise FlapsamError(f"{path}: there is no ledger here; is this the folder of a run?") from error
    except ValueError as error:
        raise FlapsamError(f"{path}: the ledger is damaged") from error


def parse_events(lines: Iterable[str]) -> list[Event]:
    """The events of a ledger's lines.

    Raises:
        ValueError: a line is no event.
    """
    return [_EVENT.validate_json(line) for line in lines]
