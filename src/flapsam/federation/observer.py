"""What long work tells whoever is watching."""

from flapsam.federation.ledger import Event


class Observer:
    """Watches a run; this one says nothing."""

    def say(self, text: str) -> None:
        """Something worth reading, once."""

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        """Work of so many steps begins, or goes on after some are done."""

    def step(self, count: int = 1) -> None:
        """Steps are done."""

    def end(self) -> None:
        """The work that began last is over."""

    def event(self, event: Event) -> None:
        """An event of the ledger."""
