"""The engine for one machine. Clients fit one after another on one network, or in parallel in worker processes."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.federation.client import Client, Own
from flapsam.federation.engines.workers import Workers
from flapsam.federation.packets import PacketRefused
from flapsam.federation.rounds import Answer, Work, deliver, rounds
from flapsam.federation.server import Server
from flapsam.learning.training import steps_a_round
from flapsam.run.ledger import Cohort, Ledger
from flapsam.run.observer import Observer


def run_rounds(
    cohort: Cohort,
    server: Server,
    clients: Sequence[Client],
    ledger: Ledger,
    observer: Observer,
    workers: Workers | None = None,
) -> None:
    """Run the remaining rounds on this machine, until all are done or validation has settled.

    Args:
        cohort: the sites that train together.
        server: the server, before its first round or between two rounds.
        clients: the clients, in the order of the sites' names.
        ledger: receives an event for every fit, refusal, validation and round.
        observer: follows the training steps and the work of each site.
        workers: processes that fit the clients in parallel, if any. The result is the same.
    """

    def carry(work: Work) -> Iterator[Answer]:
        for client, packets, answer in _answers(work, server, clients, observer, workers):
            down = sum(map(len, packets))
            if work in ("fit", "agree"):
                yield Answer(client.data.site, down, fitted=answer)
            else:
                yield Answer(client.data.site, down, scores=answer)

    # Every site of a simulation answers, so there are never too few, and none is waited for.
    options = clients[0].config.rounds.model_copy(update={"require": "all"})
    if server.collector is None:
        options = options.model_copy(update={"min_sites": 1})
    steps = sum(map(_steps, clients))
    observer.begin(str(cohort), steps * options.count, steps * server.rounds_done)
    for _ in rounds(server, cohort, options, carry, ledger.write):
        pass
    deliver(server, cohort, carry, ledger.write)
    observer.end()


def own_adapters(
    cohort: Cohort, server: Server, clients: Sequence[Client], observer: Observer, workers: Workers | None = None
) -> Iterator[tuple[str, Own]]:
    """Have every client choose the adapter that it keeps for its own use.

    Args:
        cohort: the sites that trained together.
        server: the server, after its last round.
        clients: the clients, in the order of the sites' names.
        observer: follows the work of each site.
        workers: processes that work for the clients in parallel, if any.

    Yields:
        Each site's name and its own adapter.
    """
    observer.begin(f"{cohort}: own adapters", len(clients))
    for client, _, own in _answers("own", server, clients, observer, workers):
        yield client.data.site, own
        observer.step()
    observer.end()


def _answers(
    work: Work, server: Server, clients: Sequence[Client], observer: Observer, workers: Workers | None
) -> Iterator[tuple[Client, list[bytes], Any]]:
    """Yield each client in order, with its packets and the result of its method ``work``."""
    if work in ("fit", "agree"):
        clients = [client for client in clients if server.asks(client.data.site)]
    if workers is None:
        for client in clients:
            packets = server.packets(client.data.site, client.held, work)
            observer.works(client.data.site, work)
            try:
                answer = client.fit(packets, observer.step) if work == "fit" else getattr(client, work)(packets)
            except PacketRefused as reason:
                raise FlapsamError(f"{client.data.site} refuses the server's message: {reason}") from reason
            yield client, packets, answer
        return
    sent: deque[tuple[Client, list[bytes]]] = deque()

    def jobs() -> Iterator[tuple[str, list[bytes]]]:
        for client in clients:
            sent.append((client, server.packets(client.data.site, client.held, work)))
            observer.works(client.data.site, work)
            yield client.data.site, sent[-1][1]

    for answer in workers.each(work, jobs()):
        client, packets = sent.popleft()
        if work == "fit":
            observer.step(_steps(client))
        yield client, packets, answer


def _steps(client: Client) -> int:
    """Number of training steps of a client in a round."""
    return steps_a_round(client.data.train, client.config.training, client.config.rounds)
