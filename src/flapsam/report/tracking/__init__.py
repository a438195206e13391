"""A run's figures for other software, written from the events of its ledger, while it runs or afterwards.

Where figures are looked at is no part of what a run is, so it is said on the command line and not in the configuration: it
changes no fingerprint, and a run may be gone on with under another tracker. The ledger stays the one record.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.report.run import read_run
from flapsam.report.tracking.points import Points
from flapsam.report.tracking.tracker import Tracked, Tracker
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import Event, RunEnded
from flapsam.run.observer import Observer, Observers

TRACKERS = {"tensorboard": "TensorBoard", "mlflow": "Mlflow"}
"""Name, which is that of its module here, of the package that it needs and of flapsam's extra → class."""


def tracker(name: str) -> Callable[[Tracked], Tracker]:
    """A tracker by its name.

    Raises:
        FlapsamError: there is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise FlapsamError(f"there is no tracker '{name}'; choose {' or '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise FlapsamError(f"tracking with {name} needs pip install 'flapsam[{name}]'")
    return getattr(importlib.import_module(f"flapsam.report.tracking.{name}"), TRACKERS[name])


class Tracking(Observer):
    """Feeds trackers with a run's events. One that fails is left out, and the run goes on."""

    def __init__(self, names: Iterable[str], say: Callable[[str], None]) -> None:
        """Find the trackers, before long work begins.

        Args:
            names: of ``TRACKERS``.
            say: is told of one that fails.

        Raises:
            FlapsamError: as ``tracker``.
        """
        self.kinds = {name: tracker(name) for name in names}
        self.say_so = say
        self.trackers: dict[str, Tracker] = {}
        self.ended = False

    def opened(self, config: RunConfig, events: Sequence[Event]) -> None:
        """Begin, with what the ledger holds already."""
        self.config = config
        folder = RunFolder(config.output)
        run = folder.read_environment()["run"]
        self.points = Points(config)
        for name, kind in self.kinds.items():
            about = Tracked(run, config, folder.tracker(name))
            self._try(name, lambda name=name, kind=kind, about=about: self.trackers.update({name: kind(about)}))
        for event in events:
            self._add(event)
        self._all(lambda one: one.flush())

    def event(self, event: Event) -> None:
        """Write what is new."""
        self._add(event)
        self._all(lambda one: one.flush())

    def close(self) -> None:
        """Write the rest, and say where it is."""
        self._all(lambda one: one.close(self.ended))

    @property
    def places(self) -> list[str]:
        """How to look at what was written, a sentence a tracker."""
        return [one.place for one in self.trackers.values()]

    def _add(self, event: Event) -> None:
        self.ended = self.ended or isinstance(event, RunEnded)
        found = self.points.of(event)
        if found:
            self._all(lambda one: one.write(found))

    def _all(self, what: Callable[[Tracker], None]) -> None:
        for name, one in list(self.trackers.items()):
            self._try(name, lambda one=one: what(one))

    def _try(self, name: str, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:
            self.trackers.pop(name, None)
            again = f"flapsam track {self.config.output} --to {name}"
            self.say_so(f"{name} is left out from here on ({' '.join(str(error).split())}); {again} writes what is missing")


@contextmanager
def tracked(observer: Observer, names: Sequence[str] | None, warn: Callable[[str], None]) -> Iterator[Observer]:
    """The observer, and trackers beside it, if any.

    Args:
        observer: is told at the end how to look at what was written.
        names: of trackers.
        warn: is told of one that fails.

    Raises:
        FlapsamError: as ``tracker``.
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
            observer.say(f"Figures: {place}")


def track_run(folder: Path, names: Sequence[str]) -> list[str]:
    """Write a run's figures from its ledger.

    Args:
        folder: of the run, finished or not.
        names: of trackers.

    Returns:
        How to look at each.

    Raises:
        FlapsamError: as ``tracker``; or the folder holds no run; or a tracker fails.
    """
    run = read_run(folder)
    failures: list[str] = []
    tracking = Tracking(names, failures.append)
    # The folder may have been moved since.
    tracking.opened(run.config.model_copy(update={"output": folder}), run.events)
    tracking.close()
    if failures:
        raise FlapsamError("; ".join(failures))
    return tracking.places
