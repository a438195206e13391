"""A run as its report reads it: the files of its folder, and series from its ledger."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flapsam.config import RunConfig, read_config
from flapsam.federation.folder import DESCRIPTION, LEDGER, read_identity
from flapsam.federation.ledger import Event, read_ledger, scores_in
from flapsam.metrics import CaseScores, Summary, by_site, summarise

TITLES = {"federated": "federated", "local": "local-only", "centralised": "centralised"}
"""Mode → as people read it, in the order in which modes are shown."""

Series = dict[str, dict[int, float]]
"""Site → round → value."""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    config: RunConfig
    environment: dict[str, Any]
    events: list[Event]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    def of(self, event: str, mode: str | None = None) -> Iterator[Event]:
        """The events of a kind, of all modes or one."""
        for one in self.events:
            if one["event"] == event and mode in (None, mode_of(one)):
                yield one

    @cached_property
    def modes(self) -> list[str]:
        """Those of which anything is in the ledger."""
        found = {mode_of(event) for event in self.events if "federation" in event}
        return [mode for mode in TITLES if mode in found]

    @cached_property
    def sites(self) -> list[str]:
        """All sites that the ledger names, in the order of their names."""
        return sorted({event["site"] for event in self.events if "site" in event} - {"centralised"})

    @property
    def classes(self) -> list[str]:
        """Without background."""
        return self.config.data.classes

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return any(self.of("end"))

    def rounds(self, mode: str) -> int:
        """Rounds done; of sites that train alone, those of the one that did most."""
        return max((event["round"] for event in self.of("round", mode)), default=0)

    def fits(self, mode: str, value: str) -> Series:
        """A figure that each fit told, such as ``loss``."""
        return self._series(self.of("fit", mode), lambda event: event.get(value))

    def validation(self, mode: str, of: str = "mean") -> Series:
        """Validation Dice of a class, or the mean over the classes."""
        return self._series(self.of("validation", mode), lambda event: event["dice"].get(of))

    @staticmethod
    def _series(events: Iterator[Event], value: Any) -> Series:
        series: Series = {}
        for event in events:
            found = value(event)
            if found is not None:
                series.setdefault(event["site"], {})[event["round"]] = found
        return dict(sorted(series.items()))

    @cached_property
    def scores(self) -> dict[str, list[CaseScores]]:
        """Mode → test scores, a case an entry."""
        found: dict[str, list[CaseScores]] = {mode: [] for mode in self.modes}
        for event in self.of("test"):
            found[mode_of(event)].append(scores_in(event))
        return {mode: sorted(scores, key=lambda score: (score.site, score.case)) for mode, scores in found.items() if scores}

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Mode → site → means over its test cases."""
        return {mode: {site: summarise(part) for site, part in by_site(s).items()} for mode, s in self.scores.items()}

    def pooled(self, mode: str) -> Summary | None:
        """Means over all test cases."""
        return summarise(self.scores[mode]) if mode in self.scores else None

    def bytes_of(self, key: str) -> Series:
        """Bytes of every packet of the federation's rounds, refused ones too: ``bytes_up`` or ``bytes_down``."""
        series: Series = {}
        for what in ("fit", "refused"):
            for event in self.of(what, "federated"):
                of_site = series.setdefault(event["site"], {})
                of_site[event["round"]] = of_site.get(event["round"], 0) + event.get(key, 0)
        return dict(sorted(series.items()))

    @property
    def delivered(self) -> dict[str, int]:
        """Site → bytes of what the last round gave."""
        return {event["site"]: event["bytes_down"] for event in self.of("delivery", "federated")}

    @property
    def travelled(self) -> float:
        """Bytes of all packets of the federation, both ways."""
        rounds = [self.bytes_of(way) for way in ("bytes_up", "bytes_down")]
        return sum(sum(points.values()) for series in rounds for points in series.values()) + sum(self.delivered.values())


def mode_of(event: Event) -> str:
    """The mode of an event's federation, which is named ``local/SITE`` where a site trains alone."""
    return event.get("federation", "").partition("/")[0]


def read_run(folder: Path) -> Run:
    """Read a run's folder, whether the run is over or not.

    Raises:
        FlapsamError: there is no run, one of its files is damaged, or a later version has written it.
    """
    environment = read_identity(folder)
    ledger = folder / LEDGER
    events = read_ledger(ledger, whole_lines=True) if ledger.exists() else []
    return Run(folder, read_config(folder / DESCRIPTION), environment, events)
