"""Processes that fit sites side by side, each with a network of its own."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from flapsam.errors import FlapsamError
from flapsam.federation.rounds import Client

_clients: Mapping[str, Client] = {}
"""In a worker: the sites by name, all on its one network."""


class Workers:
    """A pool of processes, as a context manager. On leaving it they are gone, whatever they were at."""

    def __init__(self, count: int, make_clients: Callable[[], Mapping[str, Client]]) -> None:
        """Begin with no process; each starts when there is work for it.

        Args:
            count: of the processes.
            make_clients: makes a worker's network and sites on it; is called once in each.
        """
        self.count = count
        # Read when torch is loaded: threads that wait must not keep the other workers' cores busy.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Spawned, because a forked copy of torch's threads hangs.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(make_clients,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()

    def each(self, work: str, jobs: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        """What the sites' method ``work`` gives, in the order of the jobs: a site's name and an argument each.

        No more jobs are taken than the workers need, so that packets do not add up.

        Raises:
            FlapsamError: a worker is gone.
        """
        running = deque()
        try:
            for site, argument in jobs:
                running.append(self.pool.submit(_work, work, site, argument))
                if len(running) > self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise FlapsamError(
                "a worker has died, perhaps for want of memory; go on with --resume and fewer --workers"
            ) from error


def _begin(make_clients: Callable[[], Mapping[str, Client]]) -> None:
    global _clients
    # An interruption is for the process that the user sees; it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _clients = make_clients()


def _work(work: str, site: str, argument: Any) -> Any:
    return getattr(_clients[site], work)(argument)
