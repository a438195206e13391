"""A run as the report needs it: the files of its folder, and series from its ledger."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flapsam.learning.metrics import CaseScores, Summary, by_site, scores_of, summarise
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import (
    AnswerRefused,
    CaseTested,
    CohortEvent,
    Delivered,
    Event,
    EventBase,
    Fitted,
    LedgerReader,
    RoundClosed,
    RunEnded,
    SiteJoined,
    Trouble,
    Validated,
)

TITLES: dict[str, str] = {
    "federated": "federated",
    "local": "local-only",
    "ensemble": "ensemble",
    "centralised": "centralised",
    "personal": "personal",
}
"""Mode → its displayed name, in the order in which modes are shown."""

Series = dict[str, dict[int, float]]
"""Site → round → value."""
Scores = Mapping[str, Sequence[CaseScores]]
"""Mode → test scores, one entry per case."""
Kind = TypeVar("Kind", bound=EventBase)
InRound = TypeVar("InRound", Fitted, Validated)


@dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

    folder: RunFolder
    config: RunConfig
    environment: dict[str, Any]
    events: list[Event]

    @property
    def name(self) -> str:
        """Name of the run's folder, without its path."""
        return self.folder.path.resolve().name

    def of(self, kind: type[Kind], mode: str | None = None) -> Iterator[Kind]:
        """The events of one kind, in one mode or in all."""
        for event in self.events:
            if isinstance(event, kind) and (mode is None or (isinstance(event, CohortEvent) and event.cohort.mode == mode)):
                yield event

    @cached_property
    def modes(self) -> list[str]:
        """The modes with events in the ledger."""
        seen = {event.cohort.mode for event in self.of(CohortEvent)}
        return [mode for mode in TITLES if mode in seen]

    @cached_property
    def sites(self) -> list[str]:
        """Names of all sites in the ledger, sorted."""
        named = {site for event in self.events if (site := getattr(event, "site", None)) is not None}
        return sorted(named - {"centralised"})

    @property
    def classes(self) -> list[str]:
        """Class names, without background."""
        return self.config.data.classes

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return any(self.of(RunEnded))

    @property
    def joined(self) -> list[SiteJoined]:
        """The sites that take part, with their cases."""
        return list(self.of(SiteJoined))

    @property
    def troubles(self) -> list[Trouble]:
        """Refused packets, answers left out, missing answers and excluded sites."""
        return [event for event in self.events if isinstance(event, Trouble)]

    def rounds(self, mode: str) -> int:
        """Number of rounds done; in mode ``local``, that of the site with the most."""
        return max((event.round for event in self.of(RoundClosed, mode)), default=0)

    def fits(self, mode: str, value: Callable[[Fitted], float | None]) -> Series:
        """A value that each fit reports, such as its loss, by site and round."""
        return _series(self.of(Fitted, mode), value)

    def validation(self, mode: str) -> Series:
        """Validation Dice by site and round, the mean over the classes."""
        return _series(self.of(Validated, mode), lambda event: event.dice.get("mean"))

    @cached_property
    def scores(self) -> dict[str, list[CaseScores]]:
        """Mode → test scores, one entry per case."""
        tested: dict[str, list[CaseScores]] = {mode: [] for mode in self.modes}
        for event in self.of(CaseTested):
            if not event.elsewhere:
                tested[event.cohort.mode].append(scores_of(event))
        return {
            mode: sorted(scores, key=lambda score: (score.site, score.case)) for mode, scores in tested.items() if scores
        }

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Mode → site → means over its test cases."""
        return {mode: {site: summarise(part) for site, part in by_site(s).items()} for mode, s in self.scores.items()}

    def pooled(self, mode: str) -> Summary | None:
        """Means over all test cases of a mode; None if none is tested."""
        return summarise(self.scores[mode]) if mode in self.scores else None

    @cached_property
    def bytes_up(self) -> Series:
        """Bytes that sites sent in the federated rounds, refused packets included."""
        return _sums((event, event.bytes_up) for kind in (Fitted, AnswerRefused) for event in self.of(kind, "federated"))

    @cached_property
    def bytes_down(self) -> Series:
        """Bytes that sites received in the federated rounds."""
        received = [(event, event.bytes_down) for event in self.of(Fitted, "federated")]
        # Sites whose packets were refused are part of the series with zero bytes, as in ``bytes_up``.
        return _sums([*received, *((event, 0) for event in self.of(AnswerRefused, "federated"))])

    @property
    def delivered(self) -> dict[str, int]:
        """Site → bytes of the result after the last round."""
        return {event.site: event.bytes_down for event in self.of(Delivered, "federated")}

    @property
    def travelled(self) -> float:
        """Bytes of all packets of the federation, in both directions."""
        rounds = sum(sum(points.values()) for series in (self.bytes_up, self.bytes_down) for points in series.values())
        return rounds + sum(self.delivered.values())


def read_run(path: Path) -> Run:
    """Read the folder of a run, which need not be complete.

    Args:
        path: the run's folder.

    Raises:
        FlapsamError: there is no run, one of its files is damaged, or it was written by a later version.
    """
    folder = RunFolder(path)
    environment = folder.read_environment()
    events = LedgerReader(folder.ledger).added() or []
    return Run(folder, folder.read_config(), environment, events)


def _series(events: Iterable[InRound], value: Callable[[InRound], float | None]) -> Series:
    series: Series = {}
    for event in events:
        reported = value(event)
        if reported is not None:
            series.setdefault(event.site, {})[event.round] = reported
    return dict(sorted(series.items()))


def _sums(values: Iterable[tuple[Fitted | AnswerRefused, int]]) -> Series:
    series: Series = {}
    for event, value in values:
        of_site = series.setdefault(event.site, {})
        of_site[event.round] = of_site.get(event.round, 0) + value
    return dict(sorted(series.items()))
