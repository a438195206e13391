"""Worker processes that fit sites in parallel, each with its own network."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.federation.client import Client


class Workers:
    """Worker processes with a pipe each, as a context manager. Leaving it kills them, even in the middle of a fit."""

    def __init__(self, count: int, make_clients: Callable[[int], Mapping[str, Client]]) -> None:
        """Start the processes.

        Args:
            count: number of processes.
            make_clients: builds the network and the clients by site of a worker, given its number. It is called once in each
                process.
        """
        # Torch reads this when it is loaded. Threads that wait must not keep the other workers' cores busy.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Workers are spawned, because a forked copy of torch's threads hangs.
        context = multiprocessing.get_context("spawn")
        self.processes = []
        self.pipes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, partial(make_clients, number)), daemon=True)
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
        """Call a method of each site's client in the workers.

        Args:
            work: name of the method.
            jobs: a site's name and the method's argument, for each call. A job is only taken when a worker is free, so that
                packets do not pile up.

        Yields:
            The methods' results, in the order of the jobs.

        Raises:
            FlapsamError: a worker has died.
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
                "a worker has died, possibly because memory ran out; resume with --resume and fewer --workers"
            ) from error


def _serve(pipe: Connection, make_clients: Callable[[], Mapping[str, Client]]) -> None:
    """Do the jobs that come through the pipe, in a worker, until it is closed."""
    # Ctrl-C is left to the parent process, which ends the workers.
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
