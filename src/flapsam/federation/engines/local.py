"""The engine for one machine: clients fit one after another on one network, or side by side in workers."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from flapsam.federation.conduct import Answer, Work, deliver, rounds
from flapsam.federation.engines.workers import Workers
from flapsam.federation.ledger import Ledger
from flapsam.federation.observer import Observer
from flapsam.federation.rounds import Client, Server
from flapsam.training import batches_per_epoch


def run_rounds(
    name: str,
    server: Server,
    clients: Sequence[Client],
    ledger: Ledger,
    observer: Observer,
    workers: Workers | None = None,
) -> None:
    """Carry packets until the rounds are done or validation has settled, going on where the server's state stands.

    Args:
        name: of this federation, in the ledger.
        server: at its start or in the middle of a run.
        clients: in the order of the sites' names.
        ledger: gets an event a fit, a refusal, a validation, a round.
        observer: is told of steps and of what each site does.
        workers: fit the clients, if given; the result is the same.
    """

    def record(event: str, **fields: Any) -> None:
        ledger.write(event, federation=name, **fields)

    def carry(work: Work) -> Iterator[Answer]:
        for client, packets, answer in _answers(work, server, clients, observer, workers):
            down = sum(map(len, packets))
            if work == "fit":
                yield Answer(client.data.site, down, fitted=answer)
            else:
                yield Answer(client.data.site, down, scores=answer)

    options = clients[0].config.rounds
    # Every site of a simulation answers, so there are never too few.
    options = options.model_copy(update={"min_sites": 1})
    steps = sum(map(_steps, clients))
    observer.begin(name, steps * options.count, steps * server.rounds_done)
    for _ in rounds(server, options, carry, record):
        pass
    deliver(server, carry, record)
    observer.end()


def _answers(
    work: Work, server: Server, clients: Sequence[Client], observer: Observer, workers: Workers | None
) -> Iterator[tuple[Client, list[bytes], Any]]:
    """Each client with the packets that it got and what its ``fit`` or ``validate`` made of them, in their order."""
    if workers is None:
        for client in clients:
            packets = server.packets(client.data.site, client.held)
            observer.works(client.data.site, work)
            yield client, packets, client.fit(packets, observer.step) if work == "fit" else client.validate(packets)
        return
    sent: deque[tuple[Client, list[bytes]]] = deque()

    def jobs() -> Iterator[tuple[str, list[bytes]]]:
        for client in clients:
            sent.append((client, server.packets(client.data.site, client.held)))
            observer.works(client.data.site, work)
            yield client.data.site, sent[-1][1]

    for answer in workers.each(work, jobs()):
        client, packets = sent.popleft()
        if work == "fit":
            observer.step(_steps(client))
        yield client, packets, answer


def _steps(client: Client) -> int:
    """Of its fit in a round."""
    return batches_per_epoch(client.data.train, client.config.training) * client.config.training.epochs
