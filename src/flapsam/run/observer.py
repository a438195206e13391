"""What long work tells whoever is watching."""

from collections.abc import Callable, Sequence

from flapsam.run.config import RunConfig
from flapsam.run.ledger import Event


class Observer:
    """Watches a run; this one says nothing."""

    def say(self, text: str) -> None:
        """A sentence worth reading."""

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        """Work of so many steps begins, or goes on after some are done."""

    def step(self, count: float = 1) -> None:
        """Steps are done, or a part of one."""

    def end(self) -> None:
        """The work that began last is over."""

    def opened(self, config: RunConfig, events: Sequence[Event]) -> None:
        """A run begins, or goes on after these events of its ledger; its folder is ``config.output``."""

    def works(self, site: str, work: str) -> None:
        """A site begins its part of a round: ``fit`` or ``validate``."""

    def event(self, event: Event) -> None:
        """An event that is new in the ledger."""


class Observers(Observer):
    """Several that watch the same run."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def say(self, text: str) -> None:
        for one in self.observers:
            one.say(text)

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        for one in self.observers:
            one.begin(title, steps, done)

    def step(self, count: float = 1) -> None:
        for one in self.observers:
            one.step(count)

    def end(self) -> None:
        for one in self.observers:
            one.end()

    def opened(self, config: RunConfig, events: Sequence[Event]) -> None:
        for one in self.observers:
            one.opened(config, events)

    def works(self, site: str, work: str) -> None:
        for one in self.observers:
            one.works(site, work)

    def event(self, event: Event) -> None:
        for one in self.observers:
            one.event(event)


def watched(observer: Observer, title: str) -> Callable[[int, int], None]:
    """A function that tells the observer of a download: bytes there are, and bytes there will be."""
    seen = -1

    def progress(done: int, total: int) -> None:
        nonlocal seen
        if seen < 0:
            observer.begin(f"{title} (MiB)", total >> 20)
            seen = 0
        observer.step((done >> 20) - (seen >> 20))
        seen = done

    return progress
