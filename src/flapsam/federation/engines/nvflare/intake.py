"""The intake of a job at the server: a site's answer is accepted once for each request, before any of it is downloaded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flapsam.federation.hospitals.handshake import LIMIT


class Unwanted(Exception):  # noqa: N818 (it is a verdict for the log)
    """Nobody asked for an answer, or it is larger than was agreed."""


class Budget:
    """The number of bytes that one answer may still bring."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def spend(self, size: int) -> None:
        """Count downloaded bytes.

        Args:
            size: number of bytes of a piece. An empty piece counts as one, so that downloads end.

        Raises:
            Unwanted: the answer is larger than was agreed.
        """
        self.left -= max(size, 1)
        if self.left < 0:
            raise Unwanted("the answer is larger than was agreed")


class Intake:
    """Counts the open requests of each site. A request stays open until it is answered, even after its deadline."""

    def __init__(self) -> None:
        self.limit = LIMIT
        """Maximum size of an answer in bytes."""
        self._lock = threading.Lock()
        self._open: dict[str, set[int]] = {}
        self._receiving: set[str] = set()
        self._thread = threading.local()

    def expect(self, site: str, number: int) -> None:
        """Open a request.

        Args:
            site: the site that is asked.
            number: the request's number.
        """
        with self._lock:
            self._open.setdefault(site, set()).add(number)

    def take(self, site: str, number: int) -> bool:
        """Close a request with its answer. False if no such request is open, in which case the answer must be dropped."""
        with self._lock:
            asked = self._open.get(site, set())
            expected = number in asked
            asked.discard(number)
            return expected

    @contextmanager
    def receiving(self, site: str) -> Iterator[None]:
        """Receive one answer of a site within the block.

        Raises:
            Unwanted: the site has no open request, or is sending another answer.
        """
        with self._lock:
            if not self._open.get(site) or site in self._receiving:
                raise Unwanted("nobody asked for this answer")
            self._receiving.add(site)
        self._thread.sender = site
        self._thread.budget = Budget(self.limit)
        try:
            yield
        finally:
            self._thread.sender = self._thread.budget = None
            with self._lock:
                self._receiving.discard(site)

    @property
    def sender(self) -> str | None:
        """The site whose answer this thread is receiving."""
        return getattr(self._thread, "sender", None)

    @property
    def budget(self) -> Budget | None:
        """The budget of the answer that this thread is receiving."""
        return getattr(self._thread, "budget", None)


INTAKE = Intake()
"""The intake of this process's job."""
