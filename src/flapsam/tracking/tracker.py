"""What a tracker is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flapsam.config import RunConfig
from flapsam.tracking.points import Point


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
        found: dict[str, str] = {}

        def walk(tree: Any, prefix: str) -> None:
            if isinstance(tree, dict) and tree:
                for key, value in tree.items():
                    walk(value, f"{prefix}.{key}" if prefix else str(key))
            else:
                found[prefix] = str(tree)

        walk(self.config.model_dump(mode="json", exclude={"bench"}), "")
        return found


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
