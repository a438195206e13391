"""What a tracker is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flapsam.report.tracking.points import Point
from flapsam.run.config import RunConfig
from flapsam.run.reading import flat


@dataclass(frozen=True)
class Tracked:
    """The run whose figures are written."""

    run: str
    """Its id."""
    config: RunConfig
    folder: Path
    """Where the tracker writes, unless it has a server."""

    @property
    def name(self) -> str:
        """For people: the run's folder."""
        return self.config.output.absolute().name

    @property
    def parameters(self) -> dict[str, str]:
        """The configuration, flat: ``training.batch_size`` → ``12``."""
        return flat(self.config, "bench")


class Tracker(ABC):
    """Writes one run's figures. It is always given all of them, from the first, and writes none twice."""

    place: str
    """A sentence: how to look at what was written."""

    @abstractmethod
    def __init__(self, run: Tracked) -> None: ...

    @abstractmethod
    def write(self, points: Sequence[Point]) -> None:
        """Write the points of one event."""

    @abstractmethod
    def flush(self) -> None:
        """Let others see what was written."""

    @abstractmethod
    def close(self, ended: bool) -> None:
        """Write the rest; the run has come to its end, or was stopped."""
