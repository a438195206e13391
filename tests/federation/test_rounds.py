"""Rounds whose answers are late, repeated, missing or too few, on an engine that plays back lists of answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flapsam.base.errors import FlapsamError
from flapsam.federation import server as server_module
from flapsam.federation.aggregation import Aggregator, aggregator
from flapsam.federation.aggregation.fedavg import FedAvg
from flapsam.federation.agreement import Agreement
from flapsam.federation.going_back import go_back
from flapsam.federation.packets import Header, decode, encode
from flapsam.federation.rounds import Answer, Work, deliver, rounds
from flapsam.federation.screening import norm, too_large
from flapsam.federation.server import Server
from flapsam.federation.state import ServerState
from flapsam.run.config import Compression, Rounds
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, Event

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


class ScriptedRun:
    """A server whose sites give prepared answers in each round."""

    def __init__(self, folder: Path, **options: object) -> None:
        start = {"w": torch.zeros(2)}
        self.agreement = Agreement("0" * 32, start, ["w"], aggregator("fedavg", 1), Compression(codec="fp32"))
        self.options = Rounds.model_validate({"count": 2, **options})
        state = ServerState(folder, self.options.keep)
        self.server = Server(self.agreement, WEIGHTS, state, max_change=self.options.max_change)
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


@pytest.mark.parametrize(
    ("require", "problem"),
    [
        (["a", "b"], r"round 1: there is no usable answer of b, required by rounds\.require"),
        (["b", "c"], r"round 1: there is no usable answer of b, c, required"),
        (2, r"round 1: too few sites answered: 1 of at least 2 \(rounds\.require\)"),
    ],
)
def test_a_round_is_not_closed_without_the_sites_that_it_requires(require: object, problem: str, tmp_path: Path):
    scripted = ScriptedRun(tmp_path, count=1, min_sites=1, require=require)
    alone = [Answer("a", 0, scripted.packet("a", 1, 1)), Answer("b", 0, missing="it is gone")]
    with pytest.raises(FlapsamError, match=problem):
        scripted.run(alone)
    assert scripted.server.rounds_done == 0
    # The next job repeats the round. A site that has answered sends the same again (test_resume.py).
    again = ScriptedRun(tmp_path, count=1, min_sites=1, require=require)
    again.run([Answer(site, 0, again.packet(site, 1, 1)) for site in WEIGHTS])
    assert again.value == pytest.approx(1) and again.server.rounds_done == 1


def test_a_required_site_without_a_weight_holds_up_nobody(tmp_path: Path):
    scripted = ScriptedRun(tmp_path, count=1, min_sites=1, require=["a", "d", "d"])
    scripted.run([Answer("a", 0, scripted.packet("a", 1, 1))])
    assert scripted.server.rounds_done == 1


HUGE = float(torch.finfo(torch.float32).max)


@pytest.mark.parametrize("site", ["a", "b", "c"])
@pytest.mark.parametrize(
    ("false", "times"), [(HUGE, "times the others'"), (-20.01, "its change is 10"), (1e9, "is 5e+08 times")]
)
def test_a_change_far_larger_than_the_others_is_left_out(site: str, false: float, times: str, tmp_path: Path):
    """The honest changes are 1 and 2 in each of the two numbers. The lower median of the norms belongs to 2, times ten."""
    scripted = ScriptedRun(tmp_path, count=1, min_sites=2)
    honest = dict(zip([name for name in WEIGHTS if name != site], (1.0, 2.0), strict=True))
    values = {**honest, site: false}
    scripted.run([Answer(name, 0, scripted.packet(name, 1, values[name])) for name in WEIGHTS])
    weight = {name: WEIGHTS[name] for name in honest}
    assert scripted.value == pytest.approx(sum(weight[n] * honest[n] for n in honest) / sum(weight.values()))
    ((number, left_out, reason),) = scripted.recorded("left_out")
    assert (number, left_out) == (1, site) and times in reason and "rounds.max_change" in reason


@pytest.mark.parametrize(
    ("values", "most", "left_out"),
    [
        ({"a": 1, "b": 10}, 10, []),
        ({"a": 1, "b": 10.5}, 10, ["b"]),
        ({"a": 0, "b": 1}, 10, []),
        ({"a": 0, "b": 0, "c": 5}, 10, []),
        ({"a": 1, "b": 1, "c": 50}, None, []),
        ({"a": 5}, 1, []),
        ({"a": 1e-9, "b": 4, "c": 5}, 2, []),
        ({"a": 1, "b": 2, "c": 3, "d": 21}, 10, ["d"]),
        ({"a": 1, "b": 2, "c": float("inf")}, 1e300, ["c"]),
    ],
)
def test_the_lower_median_is_the_measure(values: dict, most: float | None, left_out: list):
    assert list(too_large(values, most)) == left_out


def test_the_norm_is_that_of_all_numbers_together():
    """3² + 4² + 12² = 13², and float32's largest number squared does not overflow."""
    assert norm([torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]) == pytest.approx(13)
    assert norm([torch.full((4,), HUGE)]) == pytest.approx(2 * HUGE)


def test_a_result_that_is_not_finite_is_made_again_without_the_largest_change(tmp_path: Path, monkeypatch):
    """Two of three sites make the mean overflow, so the measure itself is false. One after the other is left out."""
    scripted = ScriptedRun(tmp_path, count=1, min_sites=1)
    aggregate = type(scripted.agreement.aggregator).aggregate

    def overflowing(self: Aggregator, replies: list, previous: dict, number: int) -> dict:
        result = aggregate(self, replies, previous, number)
        return {name: tensor * torch.where(tensor.abs() > 100, torch.inf, 1.0) for name, tensor in result.items()}

    monkeypatch.setattr(FedAvg, "aggregate", overflowing)
    values = {"a": 1000.0, "b": 2.0, "c": 2000.0}
    scripted.run([Answer(name, 0, scripted.packet(name, 1, value)) for name, value in values.items()])
    assert scripted.value == 2
    reason = "with it, the round's result is not finite"
    assert scripted.recorded("left_out") == [(1, "c", reason), (1, "a", reason)]


def test_a_mean_of_too_few_usable_answers_is_not_made(tmp_path: Path):
    scripted = ScriptedRun(tmp_path, count=1, min_sites=2)
    with pytest.raises(FlapsamError, match=r"round 1: too few answers are usable: 1 of at least 2 \(rounds\.min_sites\)"):
        scripted.run([Answer(name, 0, scripted.packet(name, 1, value)) for name, value in (("a", 1.0), ("b", 99.0))])
    assert [site for _, site, _ in scripted.recorded("left_out")] == ["b"]
    assert scripted.server.rounds_done == 0


def test_a_flood_of_answers_is_dropped_after_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scripted = ScriptedRun(tmp_path, count=1, min_sites=1)
    read = []
    monkeypatch.setattr(server_module, "decode", lambda *arguments: read.append(0) or decode(*arguments))
    flood = [Answer(site, 0, scripted.packet(site, 1, 1)) for site in ("a", "stranger") for _ in range(1000)]
    scripted.run([*flood, *[Answer("b", 0, missing="error")] * 1000, Answer("c", 0, b"?", seconds=float("nan"))])
    assert len(read) == 1, "only the first answer is read"
    assert [site for _, site, _ in scripted.recorded("refused")] == ["a"] * 3 + ["stranger"] * 3 + ["c"]
    assert len(scripted.recorded("missing")) == 1
    assert scripted.recorded("refused")[-1][2] == "the seconds that came with it are invalid"


@pytest.mark.parametrize("scores", [{"validation.mean": "0.5"}, {"validation.mean": 2.0}, {"validation.mean": True}, [0.5]])
def test_scores_that_are_not_numbers_are_not_recorded(scores: Any, tmp_path: Path):
    scripted = ScriptedRun(tmp_path)
    answers = [Answer("a", 7, scores=scores), Answer("b", 7, scores={"validation.mean": 0.5})]
    stray = [Answer("b", 7, scores={"validation.mean": 0.9}), Answer("stranger", 7, scores={"validation.mean": 0.9})]
    deliver(scripted.server, TOGETHER, lambda work: [*answers, *stray], scripted.events.append)
    assert [event.as_json()["event"] for event in scripted.events] == ["missing", "validation", "delivery"]
    assert scripted.recorded("missing")[0][2].startswith("its scores are invalid")


def test_a_run_goes_back_and_repeats_the_same_rounds(tmp_path: Path):
    """Each round's mean is the mean of what the sites sent: 1, 2, 3, 4. With ``keep: 2`` rounds 3 and 4 can be repeated."""
    scripted = ScriptedRun(tmp_path / "state", count=4, keep=2)
    answers = [[Answer(site, 0, scripted.packet(site, n, float(n))) for site in WEIGHTS] for n in range(1, 5)]
    scripted.run(*answers)
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").glob("*-*")}
    state = ServerState(tmp_path / "state", keep=2)
    assert state.rounds() == [2, 3, 4] and state.shared is None
    state.go_back(2)
    assert (state.rounds(), state.shared) == ([2], 2)
    assert not list((tmp_path / "state").glob("packet-*-000003"))
    again = ScriptedRun(tmp_path / "state", count=4, keep=2)
    assert (again.server.rounds_done, again.value) == (2, 2)
    again.run(*answers[2:])
    assert again.value == 4
    after = {path.name: path.read_bytes() for path in (tmp_path / "state").glob("*-*")}
    assert after.pop("went-back") == b"2"
    assert {name: after[name] for name in after if name in before} == {
        name: before[name] for name in before if name in after
    }
    assert {"round-000003.safetensors", "round-000004.safetensors"} <= after.keys() & before.keys()


def test_a_round_that_is_not_kept_is_refused_with_a_list_of_those_that_are(tmp_path: Path):
    folder = RunFolder(tmp_path)
    with pytest.raises(FlapsamError, match="there is no run here"):
        go_back(folder, 1)
    folder.environment.write_text('{"run": "0"}')
    with pytest.raises(FlapsamError, match="possible rounds: none, because no round has begun"):
        go_back(folder, 1)
    scripted = ScriptedRun(folder.server_state(TOGETHER), count=4, keep=2)
    scripted.run(*[[Answer(site, 0, scripted.packet(site, n, 1.0)) for site in WEIGHTS] for n in range(1, 5)])
    for number in (1, 2, 6):
        with pytest.raises(FlapsamError, match=rf"--from-round {number}: .* possible rounds: 3, 4, 5$"):
            go_back(folder, number)


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
