"""Rounds whose answers are late, repeated, missing or too few, on an engine that plays back lists of answers."""

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


class ScriptedRun:
    """A server whose sites give prepared answers in each round."""

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
        remaining = list(answers)

        def carry(work: Work) -> Iterator[Answer]:
            yield from remaining.pop(0)

        for _ in rounds(self.server, TOGETHER, self.options, carry, self.events.append):
            pass

    def recorded(self, kind: str) -> list[tuple]:
        events = [event.as_json() for event in self.events]
        return [(e["round"], e["site"], e["reason"]) for e in events if e["event"] == kind]

    @property
    def value(self) -> float:
        return self.server.tensors["w"][0].item()


def test_weights_are_normalised_over_the_sites_that_answered(tmp_path: Path):
    """The means are (0.5 · 1 + 0.2 · 8) / 0.7 = 3 and (0.5 · 2 + 0.3 · 4) / 0.8 = 2.75."""
    scripted = ScriptedRun(tmp_path)
    first = [
        Answer("a", 0, scripted.packet("a", 1, 1)),
        Answer("b", 0, missing="it is gone"),
        Answer("c", 0, scripted.packet("c", 1, 8)),
    ]
    second = [Answer("a", 0, scripted.packet("a", 2, 2)), Answer("b", 0, scripted.packet("b", 2, 4))]
    scripted.options = scripted.options.model_copy(update={"count": 1})
    scripted.run(first)
    assert scripted.value == pytest.approx(3)
    scripted.options = scripted.options.model_copy(update={"count": 2})
    scripted.run(second)
    assert scripted.value == pytest.approx(2.75)
    assert scripted.recorded("missing") == [(1, "b", "it is gone")]


def test_late_and_repeated_packets_are_refused_and_change_nothing(tmp_path: Path):
    scripted = ScriptedRun(tmp_path)
    first = [Answer("a", 0, scripted.packet("a", 1, 1)), Answer("b", 0, scripted.packet("b", 1, 1))]
    second = [
        Answer("c", 0, scripted.packet("c", 1, 1000)),
        Answer("a", 0, scripted.packet("a", 2, 2)),
        Answer("a", 0, scripted.packet("a", 2, 1000)),
        Answer("b", 0, scripted.packet("b", 2, 2)),
    ]
    scripted.run(first, second)
    assert scripted.value == pytest.approx(2)
    assert scripted.recorded("refused") == [
        (2, "c", "it answers round 1, but the current round is 2"),
        (2, "a", "a has already answered this round"),
    ]


def test_a_round_with_too_few_answers_is_repeated(tmp_path: Path):
    scripted = ScriptedRun(tmp_path, min_sites=2, count=1)
    too_few = [Answer("a", 0, scripted.packet("a", 1, 1)), Answer("b", 0, missing="no answer within 3600 s")]
    with pytest.raises(FlapsamError, match=r"round 1: too few sites answered: 1 of at least 2 \(rounds\.min_sites\)"):
        scripted.run(too_few)
    assert scripted.server.rounds_done == 0 and scripted.value == 0
    repeated = ScriptedRun(tmp_path, min_sites=2, count=1)
    repeated.run([Answer("a", 0, scripted.packet("a", 1, 1)), Answer("b", 0, scripted.packet("b", 1, 1))])
    assert repeated.value == pytest.approx(1)
    assert not repeated.recorded("refused")


def test_a_missing_answer_to_the_delivery_is_recorded(tmp_path: Path):
    scripted = ScriptedRun(tmp_path)
    deliver(
        scripted.server,
        TOGETHER,
        lambda work: [Answer("a", 7, scores={"validation.mean": 0.5}), Answer("b", 0, missing="it is gone")],
        scripted.events.append,
    )
    recorded = [{key: value for key, value in event.as_json().items() if key != "time"} for event in scripted.events]
    assert recorded == [
        {"event": "validation", "federation": "federated", "round": 0, "site": "a", "dice": {"mean": 0.5}},
        {"event": "delivery", "federation": "federated", "round": 0, "site": "a", "bytes_down": 7},
        {"event": "missing", "federation": "federated", "round": 0, "site": "b", "work": "validate", "reason": "it is gone"},
    ]
