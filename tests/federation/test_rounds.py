"""Rounds whose answers are late, repeated, missing or too few, on an engine made of two lists."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flapsam.base.errors import FlapsamError
from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import Agreement
from flapsam.federation.packets import Header, encode
from flapsam.federation.rounds import Answer, Work, deliver, rounds
from flapsam.federation.server import Server
from flapsam.federation.state import ServerState
from flapsam.run.config import Compression, Rounds
from flapsam.run.ledger import TOGETHER, Event

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


class Bench:
    """A server, and what its sites will answer in each round."""

    def __init__(self, folder: Path, **options: object) -> None:
        start = {"w": torch.zeros(2)}
        self.agreement = Agreement("0" * 32, start, ["w"], aggregator("fedavg", 1), Compression(codec="fp32"))
        self.server = Server(self.agreement, WEIGHTS, ServerState(folder))
        self.options = Rounds.model_validate({"count": 2, **options})
        self.events: list[Event] = []

    def packet(self, site: str, number: int, value: float) -> bytes:
        header = Header(run="0" * 32, round=number, base=number - 1, sender=site, samples=1)
        return encode(header, self.agreement.up(site, number), {"w": torch.full((2,), value)})

    def run(self, *answers: list[Answer]) -> None:
        left = list(answers)

        def carry(work: Work) -> Iterator[Answer]:
            yield from left.pop(0)

        for _ in rounds(self.server, TOGETHER, self.options, carry, self.events.append):
            pass

    def recorded(self, kind: str) -> list[tuple]:
        events = [event.as_json() for event in self.events]
        return [(e["round"], e["site"], e["reason"]) for e in events if e["event"] == kind]

    @property
    def value(self) -> float:
        return self.server.tensors["w"][0].item()


def test_weights_are_those_of_the_sites_that_answered(tmp_path: Path):
    """(0.5 · 1 + 0.2 · 8) / 0.7 = 3, then (0.5 · 2 + 0.3 · 4) / 0.8 = 2.75."""
    bench = Bench(tmp_path)
    first = [
        Answer("a", 0, bench.packet("a", 1, 1)),
        Answer("b", 0, missing="it is gone"),
        Answer("c", 0, bench.packet("c", 1, 8)),
    ]
    second = [Answer("a", 0, bench.packet("a", 2, 2)), Answer("b", 0, bench.packet("b", 2, 4))]
    bench.options = bench.options.model_copy(update={"count": 1})
    bench.run(first)
    assert bench.value == pytest.approx(3)
    bench.options = bench.options.model_copy(update={"count": 2})
    bench.run(second)
    assert bench.value == pytest.approx(2.75)
    assert bench.recorded("missing") == [(1, "b", "it is gone")]


def test_late_and_repeated_packets_are_refused_and_change_nothing(tmp_path: Path):
    bench = Bench(tmp_path)
    first = [Answer("a", 0, bench.packet("a", 1, 1)), Answer("b", 0, bench.packet("b", 1, 1))]
    second = [
        Answer("c", 0, bench.packet("c", 1, 1000)),
        Answer("a", 0, bench.packet("a", 2, 2)),
        Answer("a", 0, bench.packet("a", 2, 1000)),
        Answer("b", 0, bench.packet("b", 2, 2)),
    ]
    bench.run(first, second)
    assert bench.value == pytest.approx(2)
    assert bench.recorded("refused") == [
        (2, "c", "of round 1, the round is 2"),
        (2, "a", "a has answered this round already"),
    ]


def test_a_round_that_too_few_answer_is_done_again(tmp_path: Path):
    bench = Bench(tmp_path, min_sites=2, count=1)
    alone = [Answer("a", 0, bench.packet("a", 1, 1)), Answer("b", 0, missing="no answer within 3600 s")]
    with pytest.raises(FlapsamError, match=r"round 1: 1 sites answered, rounds\.min_sites is 2"):
        bench.run(alone)
    assert bench.server.rounds_done == 0 and bench.value == 0
    again = Bench(tmp_path, min_sites=2, count=1)
    again.run([Answer("a", 0, bench.packet("a", 1, 1)), Answer("b", 0, bench.packet("b", 1, 1))])
    assert again.value == pytest.approx(1)
    assert not again.recorded("refused")


def test_what_is_missing_at_the_delivery_is_said(tmp_path: Path):
    bench = Bench(tmp_path)
    deliver(
        bench.server,
        TOGETHER,
        lambda work: [Answer("a", 7, scores={"validation.mean": 0.5}), Answer("b", 0, missing="it is gone")],
        bench.events.append,
    )
    recorded = [{key: value for key, value in event.as_json().items() if key != "time"} for event in bench.events]
    assert recorded == [
        {"event": "validation", "federation": "federated", "round": 0, "site": "a", "dice": {"mean": 0.5}},
        {"event": "delivery", "federation": "federated", "round": 0, "site": "a", "bytes_down": 7},
        {"event": "missing", "federation": "federated", "round": 0, "site": "b", "work": "validate", "reason": "it is gone"},
    ]
