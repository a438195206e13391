"""Interface of trackers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flapsam.report.tracking.points import Point
from flapsam.run.config import RunConfig
from flapsam.run.reading import flat


@dataclass(frozen=True)
class Tracked:
    """The run whose metrics a tracker writes."""

    run: str
    """The run's id."""
    config: RunConfig
    folder: Path
    """Folder for the tracker's files, unless it writes to a server."""

    @property
    def name(self) -> str:
        """The run's displayed name, which is that of its folder."""
        return self.config.output.absolute().name

    @property
    def parameters(self) -> dict[str, str]:
        """The configuration, flat: ``training.batch_size`` → ``12``."""
        return flat(self.config, "bench")


class Tracker(ABC):
    """Writes the metrics of one run. It always receives every point from the first one on, and must write none twice."""

    place: str
    """How to look at the metrics: a command or an address."""

    @abstractmethod
    def __init__(self, run: Tracked) -> None: ...

    @abstractmethod
    def write(self, points: Sequence[Point]) -> None:
        """Write the points of one event."""

    @abstractmethod
    def flush(self) -> None:
        """Make the points written so far visible to readers."""

    @abstractmethod
    def close(self, ended: bool) -> None:
        """Write the remaining points and close the tracker.

        Args:
            ended: whether the run is complete, and not only stopped.
        """
