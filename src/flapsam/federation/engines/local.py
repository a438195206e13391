"""The engine for one machine: clients fit one after another, sharing one network in memory."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from flapsam.federation.ledger import Ledger
from flapsam.federation.observer import Observer
from flapsam.federation.packets import PacketRefused
from flapsam.federation.rounds import FIT, VALIDATION, Client, Server, settled
from flapsam.training import batches_per_epoch


def run_rounds(name: str, server: Server, clients: Sequence[Client], ledger: Ledger, observer: Observer) -> None:
    """Carry packets until the rounds are done or validation has settled, going on where the server's state stands.

    Args:
        name: of this federation, in the ledger.
        server: at its start or in the middle of a run.
        clients: in the order of the sites' names.
        ledger: gets an event a fit, a refusal, a validation, a round.
        observer: is told of steps and events.
    """

    def record(event: str, **fields: Any) -> None:
        observer.event(ledger.write(event, federation=name, **fields))

    def record_validation(number: int, site: str, metrics: Mapping[str, float | None]) -> None:
        scores = {key.removeprefix(VALIDATION): value for key, value in metrics.items() if key.startswith(VALIDATION)}
        if "mean" in scores:
            record("validation", round=number, site=site, dice=scores)

    options = clients[0].config.rounds
    steps = sum(batches_per_epoch(client.data.train, client.config.training) for client in clients)
    steps *= clients[0].config.training.epochs
    observer.begin(name, steps * options.count, steps * server.rounds_done)
    while server.rounds_done < options.count and not settled(server.validation, options.patience, options.settled):
        number = server.rounds_done + 1
        started = time.perf_counter()
        for client in clients:
            site = client.data.site
            packets = server.packets(site, client.held)
            answer = client.fit(packets, observer.step)
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
    for client in clients:
        packets = server.packets(client.data.site, client.held)
        record_validation(server.rounds_done, client.data.site, client.validate(packets))
        record("delivery", round=server.rounds_done, site=client.data.site, bytes_down=sum(map(len, packets)))
    observer.end()
