"""What long work tells whoever is watching."""

from collections.abc import Callable

from flapsam.federation.ledger import Event


class Observer:
    """Watches a run; this one says nothing."""

    def say(self, text: str) -> None:
        """Something worth reading, once."""

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        """Work of so many steps begins, or goes on after some are done."""

    def step(self, count: float = 1) -> None:
        """Steps are done, or a part of one."""

    def end(self) -> None:
        """The work that began last is over."""

    def event(self, event: Event) -> None:
        """An event of the ledger."""


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
