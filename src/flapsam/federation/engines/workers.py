"""Processes that fit sites side by side, each with a network of its own."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.federation.client import Client


class Workers:
    """Processes with a pipe each, as a context manager. On leaving it they are gone, whatever they were at."""

    def __init__(self, count: int, make_clients: Callable[[], Mapping[str, Client]]) -> None:
        """Start the processes.

        Args:
            count: of them.
            make_clients: makes a worker's network and sites on it; is called once in each.
        """
        # Read when torch is loaded: threads that wait must not keep the other workers' cores busy.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Spawned, because a forked copy of torch's threads hangs.
        context = multiprocessing.get_context("spawn")
        self.processes = []
        self.pipes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make_clients), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            pipe.close()
        for process in self.processes:
            process.join()

    def each(self, work: str, jobs: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        """What the sites' method ``work`` gives, in the order of the jobs: a site's name and an argument each.

        A job is taken when a worker is free, so that packets do not add up.

        Raises:
            FlapsamError: a worker is gone.
        """
        waiting = enumerate(jobs)
        free, busy = deque(self.pipes), {}
        done: dict[int, Any] = {}
        following = 0
        try:
            while True:
                while free and (job := next(waiting, None)) is not None:
                    number, (site, argument) = job
                    pipe = free.popleft()
                    busy[pipe] = number
                    pipe.send((work, site, argument))
                if not busy:
                    return
                for pipe in wait(list(busy)):
                    failed, answer = pipe.recv()  # type: ignore[union-attr]
                    if failed:
                        raise answer
                    done[busy.pop(pipe)] = answer
                    free.append(pipe)
                while following in done:
                    yield done.pop(following)
                    following += 1
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise FlapsamError(
                "a worker has died, perhaps for want of memory; go on with --resume and fewer --workers"
            ) from error


def _serve(pipe: Connection, make_clients: Callable[[], Mapping[str, Client]]) -> None:
    """In a worker: do what comes through the pipe until it is closed."""
    # An interruption is for the process that the user sees; it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    clients = make_clients()
    while True:
        try:
            work, site, argument = pipe.recv()
        except EOFError:
            return
        try:
            answer = (False, getattr(clients[site], work)(argument))
        except Exception as error:
            answer = (True, error)
        pipe.send(answer)
