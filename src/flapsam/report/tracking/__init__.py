"""Trackers, which write a run's metrics for other software from the events of its ledger, during the run or afterwards.

Trackers are chosen on the command line and not in the configuration, because they do not affect the run. The run's
fingerprint therefore does not depend on them, and a resumed run may use other trackers. The ledger stays the only record.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder
from flapsam.report.run import read_run
from flapsam.report.tracking.points import Points
from flapsam.report.tracking.tracker import Tracked, Tracker
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import Event, RunEnded
from flapsam.run.observer import Observer, Observers

TRACKERS = {"tensorboard": "TensorBoard", "mlflow": "Mlflow"}
"""Name of a tracker → its class. Its module here, the package that it needs and flapsam's extra have the same name."""


def tracker(name: str) -> Callable[[Tracked], Tracker]:
    """The class of a tracker.

    Args:
        name: the tracker's name, from ``TRACKERS``.

    Raises:
        FlapsamError: the name is unknown, or the tracker's package is not installed.
    """
    if name not in TRACKERS:
        raise FlapsamError(f"unknown tracker '{name}'; choose {' or '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise FlapsamError(f"tracking with {name} needs another package; run pip install 'flapsam[{name}]'")
    return getattr(importlib.import_module(f"flapsam.report.tracking.{name}"), TRACKERS[name])


class Tracking(Observer):
    """Passes a run's events to trackers. If a tracker fails, the run continues without it."""

    def __init__(self, names: Iterable[str], say: Callable[[str], None]) -> None:
        """Import the trackers, so that a missing package is found before long work begins.

        Args:
            names: the trackers' names, from ``TRACKERS``.
            say: called with a sentence if a tracker fails.

        Raises:
            FlapsamError: as for ``tracker``.
        """
        self.kinds = {name: tracker(name) for name in names}
        self.say_so = say
        self.trackers: dict[str, Tracker] = {}
        self.ended = False

    def opened(self, config: RunConfig, events: Sequence[Event]) -> None:
        """Start the trackers and pass on the events that are already in the ledger."""
        self.config = config
        folder = RunFolder(config.output)
        run = folder.read_environment()["run"]
        self.points = Points(config)
        for name, kind in self.kinds.items():
            target = Tracked(run, config, folder.tracker(name))
            self._try(name, lambda name=name, kind=kind, target=target: self._start(name, kind, target))
        for event in events:
            self._add(event)
        self._all(lambda tracker: tracker.flush())

    def event(self, event: Event) -> None:
        """Write the points of a new event."""
        self._add(event)
        self._all(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Write the remaining points and close all trackers."""
        self._all(lambda tracker: tracker.close(self.ended))

    @property
    def places(self) -> list[str]:
        """How to look at the metrics, one sentence per tracker."""
        return [tracker.place for tracker in self.trackers.values()]

    def _start(self, name: str, kind: Callable[[Tracked], Tracker], target: Tracked) -> None:
        # Trackers' files may be readable for everyone, so the folder around them keeps other users out.
        make_folder(target.folder.parent)
        self.trackers[name] = kind(target)

    def _add(self, event: Event) -> None:
        self.ended = self.ended or isinstance(event, RunEnded)
        points = self.points.of(event)
        if points:
            self._all(lambda tracker: tracker.write(points))

    def _all(self, work: Callable[[Tracker], None]) -> None:
        for name, running in list(self.trackers.items()):
            self._try(name, lambda running=running: work(running))

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.trackers.pop(name, None)
            reason, command = " ".join(str(error).split()), f"flapsam track {self.config.output} --to {name}"
            self.say_so(f"{name} has failed and is left out from now on ({reason}); run {command} to write all metrics")


@contextmanager
def tracked(observer: Observer, names: Sequence[str] | None, warn: Callable[[str], None]) -> Iterator[Observer]:
    """Add trackers to an observer.

    Args:
        observer: follows the run, and prints at the end how to look at the metrics.
        names: the trackers' names; no trackers if None or empty.
        warn: called with a sentence if a tracker fails.

    Yields:
        An observer that also feeds the trackers.

    Raises:
        FlapsamError: as for ``tracker``.
    """
    if not names:
        yield observer
        return
    tracking = Tracking(names, warn)
    try:
        yield Observers(observer, tracking)
    finally:
        tracking.close()
        for place in tracking.places:
            observer.say(f"To see the metrics: {place}")


def track_run(folder: Path, names: Sequence[str]) -> list[str]:
    """Write a run's metrics from its ledger.

    Args:
        folder: the run's folder. The run may still be unfinished.
        names: the trackers' names.

    Returns:
        How to look at the metrics, one sentence per tracker.

    Raises:
        FlapsamError: as for ``tracker``, the folder holds no run, or a tracker fails.
    """
    run = read_run(folder)
    failures: list[str] = []
    tracking = Tracking(names, failures.append)
    # The folder may have been moved since the run.
    tracking.opened(run.config.model_copy(update={"output": folder}), run.events)
    tracking.close()
    if failures:
        raise FlapsamError("; ".join(failures))
    return tracking.places
