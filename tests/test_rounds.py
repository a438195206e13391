"""Server and clients by themselves, without an engine: prepare, execute, assert."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flapsam.errors import FlapsamError
from flapsam.federation.aggregation import aggregator
from flapsam.federation.ledger import Ledger, read_ledger
from flapsam.federation.packets import Contract, Header, PacketRefused, decode, encode
from flapsam.federation.rounds import SERVER, Server
from flapsam.federation.state import ClientState, ServerState

START = {"w": torch.zeros(2)}
CONTRACT = Contract.of(START)


def server(folder: Path, run: str = "r") -> Server:
    made = Server(run, CONTRACT, {"a": 0.25, "b": 0.75}, lambda: aggregator("fedavg", 1), ServerState(folder))
    made.start(START)
    return made


def reply(sender: str, value: float, *, run: str = "r", number: int = 1, contract: Contract = CONTRACT) -> bytes:
    header = Header(run=run, round=number, sender=sender, contract=contract.hash)
    return encode(header, {"w": torch.full((2,), value)})


def tensors(packet: bytes) -> dict[str, Tensor]:
    return decode(packet, CONTRACT)[1]


def test_a_round(tmp_path: Path):
    made = server(tmp_path)
    made.receive(reply("b", 4.0))
    made.receive(reply("a", 8.0))
    assert made.close_round() == 1
    assert tensors(made.packet)["w"].tolist() == [5.0, 5.0]  # 0.25 · 8 + 0.75 · 4
    header = decode(made.packet, CONTRACT)[0]
    assert (header.round, header.sender, header.run) == (1, SERVER, "r")


def test_weights_are_normalised_over_those_who_answered(tmp_path: Path):
    made = server(tmp_path)
    made.receive(reply("a", 8.0))
    made.close_round()
    assert tensors(made.packet)["w"].tolist() == [8.0, 8.0]


REFUSED = {
    "other run": (reply("a", 1.0, run="x"), "of another run"),
    "stranger": (reply("c", 1.0), "'c', who is not among the sites"),
    "late": (reply("a", 1.0, number=0), "of round 0, the round is 1"),
    "early": (reply("a", 1.0, number=2), "of round 2, the round is 1"),
    "other contract": (reply("a", 1.0, contract=Contract({"v": (2,)})), "another contract"),
    "not a number": (reply("a", float("nan")), "NaN"),
}


@pytest.mark.parametrize(("packet", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_reply_is_refused_and_the_round_goes_on(packet: bytes, reason: str, tmp_path: Path):
    made = server(tmp_path)
    with pytest.raises(PacketRefused, match=reason):
        made.receive(packet)
    made.receive(reply("b", 4.0))
    made.close_round()
    assert tensors(made.packet)["w"].tolist() == [4.0, 4.0]


def test_a_repeated_reply_is_refused(tmp_path: Path):
    made = server(tmp_path)
    made.receive(reply("a", 1.0))
    with pytest.raises(PacketRefused, match="a has answered this round already"):
        made.receive(reply("a", 2.0))


def test_without_any_reply_a_round_cannot_end(tmp_path: Path):
    with pytest.raises(FlapsamError, match="round 1: no site"):
        server(tmp_path).close_round()


def test_a_restarted_server_goes_on_where_it_stood(tmp_path: Path):
    first = server(tmp_path)
    first.receive(reply("a", 8.0))
    first.close_round()
    first.receive(reply("a", 16.0, number=2))
    second = server(tmp_path)
    assert second.rounds_done == 1
    assert second.tensors["w"].tolist() == [8.0, 8.0]
    # The open round's replies are sent again.
    second.receive(reply("a", 16.0, number=2))


def test_a_server_does_not_go_on_with_another_run(tmp_path: Path):
    server(tmp_path)
    with pytest.raises(FlapsamError, match="another run"):
        server(tmp_path, run="other")


def test_a_client_keeps_its_last_reply_and_moments(tmp_path: Path):
    state = ClientState(tmp_path)
    for number in (1, 2, 3):
        state.moments(number).write_bytes(b"%d" % number)
        state.commit(number, b"reply %d" % number)
    assert state.reply(3) == b"reply 3"
    assert state.reply(2) is None
    newest = state.moments_before(5)
    assert newest is not None and newest.read_bytes() == b"3"
    assert state.moments_before(3) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_moments_survive_a_round_without_any(tmp_path: Path):
    state = ClientState(tmp_path)
    state.moments(1).write_bytes(b"1")
    state.commit(1, b"")
    state.commit(2, b"")
    newest = state.moments_before(3)
    assert newest is not None and newest.read_bytes() == b"1"


def test_the_ledger_repairs_a_cut_line_and_writes_nothing_twice(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    ledger = Ledger(path)
    ledger.write("fit", federation="f", round=1, site="a", loss=0.5)
    with path.open("a") as file:
        file.write('{"event": "fit", "fed')
    again = Ledger(path)
    assert again.holds("fit", federation="f", round=1, site="a")
    again.write("fit", federation="f", round=1, site="a", loss=0.7)
    again.write("fit", federation="f", round=2, site="a", loss=0.4)
    assert [(event["round"], event["loss"]) for event in read_ledger(path)] == [(1, 0.5), (2, 0.4)]


def test_a_damaged_ledger_is_said(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    with pytest.raises(FlapsamError, match="no ledger"):
        read_ledger(path)
    path.write_text("nonsense\n")
    with pytest.raises(FlapsamError, match="damaged"):
        read_ledger(path)
