"""Observers, which follow a run or other long work."""

from collections.abc import Callable, Sequence

from flapsam.run.config import RunConfig
from flapsam.run.ledger import Event


class Observer:
    """Follows a run. This one shows nothing."""

    def say(self, text: str) -> None:
        """Show a sentence."""

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        """Show that work with a number of steps begins, or resumes when some of them are done."""

    def step(self, count: float = 1) -> None:
        """Show that steps, or a part of one, are done."""

    def end(self) -> None:
        """Show that the work begun last has ended."""

    def opened(self, config: RunConfig, events: Sequence[Event]) -> None:
        """Show that a run begins, or resumes after these events of its ledger. Its folder is ``config.output``."""

    def works(self, site: str, work: str) -> None:
        """Show that a site begins its part of a round: ``fit`` or ``validate``."""

    def event(self, event: Event) -> None:
        """Show a new event of the ledger."""


class Observers(Observer):
    """Several observers of the same run."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def say(self, text: str) -> None:
        for observer in self.observers:
            observer.say(text)

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        for observer in self.observers:
            observer.begin(title, steps, done)

    def step(self, count: float = 1) -> None:
        for observer in self.observers:
            observer.step(count)

    def end(self) -> None:
        for observer in self.observers:
            observer.end()

    def opened(self, config: RunConfig, events: Sequence[Event]) -> None:
        for observer in self.observers:
            observer.opened(config, events)

    def works(self, site: str, work: str) -> None:
        for observer in self.observers:
            observer.works(site, work)

    def event(self, event: Event) -> None:
        for observer in self.observers:
            observer.event(event)


def watched(observer: Observer, title: str) -> Callable[[int, int], None]:
    """A callback that reports a download to the observer. It takes the number of bytes received and the total."""
    seen = -1

    def progress(done: int, total: int) -> None:
        nonlocal seen
        if seen < 0:
            observer.begin(f"{title} (MiB)", total >> 20)
            seen = 0
        observer.step((done >> 20) - (seen >> 20))
        seen = done

    return progress
