"""The engine for one machine: clients fit one after another on one network, or side by side in workers."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flapsam.federation.engines.workers import Workers
from flapsam.federation.ledger import Ledger
from flapsam.federation.observer import Observer
from flapsam.federation.packets import PacketRefused
from flapsam.federation.rounds import FIT, VALIDATION, Client, Server, settled
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
        observer: is told of steps and events.
        workers: fit the clients, if given; the result is the same.
    """

    def record(event: str, **fields: Any) -> None:
        observer.event(ledger.write(event, federation=name, **fields))

    def record_validation(number: int, site: str, metrics: Mapping[str, float | None]) -> None:
        scores = {key.removeprefix(VALIDATION): value for key, value in metrics.items() if key.startswith(VALIDATION)}
        if "mean" in scores:
            record("validation", round=number, site=site, dice=scores)

    options = clients[0].config.rounds
    steps = sum(map(_steps, clients))
    observer.begin(name, steps * options.count, steps * server.rounds_done)
    while server.rounds_done < options.count and not settled(server.validation, options.patience, options.settled):
        number = server.rounds_done + 1
        started = time.perf_counter()
        for client, packets, answer in _answers("fit", server, clients, observer, workers):
            site = client.data.site
            try:
                header = server.receive(answer, site)
            except PacketRefused as reason:
                record("refused", round=number, site=site, reason=str(reason), bytes_up=len(answer))
                continue
            record_validation(number - 1, site, header.metrics)
            record(
                "fit",
                round=number,
                site=site,
                bytes_down=sum(map(len, packets)),
                bytes_up=len(answer),
                slices=header.samples,
                **{key: header.metrics.get(key) for key in FIT},
            )
        aggregating = time.perf_counter()
        server.close_round()
        now = time.perf_counter()
        record("round", round=number, seconds=now - started, aggregation_seconds=now - aggregating)
    for client, packets, scores in _answers("validate", server, clients, observer, workers):
        record_validation(server.rounds_done, client.data.site, scores)
        record("delivery", round=server.rounds_done, site=client.data.site, bytes_down=sum(map(len, packets)))
    observer.end()


def _answers(
    work: str, server: Server, clients: Sequence[Client], observer: Observer, workers: Workers | None
) -> Iterator[tuple[Client, list[bytes], Any]]:
    """Each client with the packets that it got and what its ``fit`` or ``validate`` made of them, in their order."""
    if workers is None:
        for client in clients:
            packets = server.packets(client.data.site, client.held)
            yield client, packets, client.fit(packets, observer.step) if work == "fit" else client.validate(packets)
        return
    sent: deque[tuple[Client, list[bytes]]] = deque()

    def jobs() -> Iterator[tuple[str, list[bytes]]]:
        for client in clients:
            sent.append((client, server.packets(client.data.site, client.held)))
            yield client.data.site, sent[-1][1]

    for answer in workers.each(work, jobs()):
        client, packets = sent.popleft()
        if work == "fit":
            observer.step(_steps(client))
        yield client, packets, answer


def _steps(client: Client) -> int:
    """Of its fit in a round."""
    return batches_per_epoch(client.data.train, client.config.training) * client.config.training.epochs
