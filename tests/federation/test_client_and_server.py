"""Server and clients by themselves, without an engine: prepare, execute, assert."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import SERVER, Agreement
from flapsam.federation.packets import Contract, Header, PacketRefused, decode, encode
from flapsam.federation.rounds import settled
from flapsam.federation.server import Server
from flapsam.federation.server_optimizers import SERVER_OPTIMIZERS, server_step
from flapsam.federation.state import ClientState, ServerState
from flapsam.run.config import Compression, ServerOptions

START = {"w": torch.zeros(2)}


def agreement(run: str = "r", codec: str = "fp32", **fields: object) -> Agreement:
    return Agreement(run, START, START.keys(), aggregator("fedavg", 1), Compression(codec=codec, density=0.5), **fields)  # type: ignore[arg-type]


def server(folder: Path, run: str = "r", codec: str = "fp32") -> Server:
    return Server(agreement(run, codec), {"a": 0.25, "b": 0.75}, ServerState(folder))


def reply(sender: str, value: float, *, run: str = "r", number: int = 1, contract: Contract | None = None) -> bytes:
    header = Header(run=run, round=number, base=number - 1, sender=sender)
    return encode(header, contract or agreement().contract, {"w": torch.full((2,), value)})


def opened(packet: bytes, codec: str = "fp32") -> tuple[Header, dict[str, Tensor]]:
    """A packet from the server."""
    agreed = agreement(codec=codec)
    return decode(packet, lambda header: agreed.from_server(header, 1), agreed.contract.tensor_bytes)


def tensors(made: Server) -> dict[str, Tensor]:
    """What a site finds in the newest packet."""
    (packet,) = made.packets("a", made.rounds_done - 1)
    return opened(packet)[1]


def test_a_round(tmp_path: Path):
    made = server(tmp_path)
    made.receive(reply("b", 4.0), "b")
    made.receive(reply("a", 8.0), "a")
    assert made.close_round() == 1
    assert tensors(made)["w"].tolist() == [5.0, 5.0]  # 0.25 · 8 + 0.75 · 4
    header = opened(made.packets("a", 0)[0])[0]
    assert (header.round, header.sender, header.run) == (1, SERVER, "r")


def test_the_first_packet_says_only_that_a_round_begins(tmp_path: Path):
    (packet,) = server(tmp_path).packets("a", 0)
    header, found = opened(packet)
    assert (header.round, header.base, found) == (0, 0, {})


def test_weights_are_normalised_over_those_who_answered(tmp_path: Path):
    made = server(tmp_path)
    made.receive(reply("a", 8.0), "a")
    made.close_round()
    assert tensors(made)["w"].tolist() == [8.0, 8.0]


REFUSED = {
    "other run": (reply("a", 1.0, run="x"), "of another run"),
    "stranger": (reply("c", 1.0), "'c', who is not among the sites"),
    "other site": (reply("b", 1.0), "'b' in the place of 'a'"),
    "early": (reply("a", 1.0, number=2), "of round 2, the round is 1"),
    "other contract": (reply("a", 1.0, contract=Contract({"w": (2,)})), "another contract"),
    "not a number": (reply("a", float("nan")), "NaN"),
}


@pytest.mark.parametrize(("packet", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_reply_is_refused_and_the_round_goes_on(packet: bytes, reason: str, tmp_path: Path):
    made = server(tmp_path)
    with pytest.raises(PacketRefused, match=reason):
        made.receive(packet, "a")
    made.receive(reply("b", 4.0), "b")
    made.close_round()
    assert tensors(made)["w"].tolist() == [4.0, 4.0]


def test_a_late_reply_is_refused(tmp_path: Path):
    made = server(tmp_path)
    made.receive(reply("a", 1.0), "a")
    made.close_round()
    with pytest.raises(PacketRefused, match="of round 1, the round is 2"):
        made.receive(reply("b", 1.0), "b")


def test_a_repeated_reply_is_refused(tmp_path: Path):
    made = server(tmp_path)
    made.receive(reply("a", 1.0), "a")
    with pytest.raises(PacketRefused, match="a has answered this round already"):
        made.receive(reply("a", 2.0), "a")


def test_without_any_reply_a_round_cannot_end(tmp_path: Path):
    with pytest.raises(FlapsamError, match="round 1: no site"):
        server(tmp_path).close_round()


def test_a_restarted_server_goes_on_where_it_stood(tmp_path: Path):
    first = server(tmp_path)
    first.receive(reply("a", 8.0), "a")
    first.close_round()
    first.receive(reply("a", 16.0, number=2), "a")
    second = server(tmp_path)
    assert second.rounds_done == 1
    assert second.tensors["w"].tolist() == [8.0, 8.0]
    # The open round's replies are sent again.
    second.receive(reply("a", 16.0, number=2), "a")


def test_a_server_does_not_go_on_with_another_run(tmp_path: Path):
    server(tmp_path)
    with pytest.raises(FlapsamError, match="another run"):
        server(tmp_path, run="other")


def change(site: str, number: int, values: list[float]) -> bytes:
    """With ``topk`` at a half one of the two numbers travels, the larger."""
    header = Header(run="r", round=number, base=number - 1, sender=site)
    return encode(header, agreement(codec="topk").contract, {"w": torch.tensor(values)})


def test_what_is_lost_on_the_way_down_comes_with_the_next_packet(tmp_path: Path):
    made = server(tmp_path, codec="topk")
    made.receive(change("a", 1, [4.0, 0.0]), "a")
    made.receive(change("b", 1, [0.0, 8.0]), "b")
    made.close_round()
    # The mean is 0.25 · (4, 0) + 0.75 · (0, 8) = (1, 6); of it only the 6 travels.
    assert opened(made.packets("a", 0)[0], "topk")[1]["w"].tolist() == [0.0, 6.0]
    assert made.tensors["w"].tolist() == [0.0, 6.0]
    assert made.globals["w"].tolist() == [1.0, 6.0]
    made.receive(change("b", 2, [2.0, 0.0]), "b")
    made.close_round()
    # The global tensors are (3, 6), the sites have (0, 6): 3 travels.
    assert opened(made.packets("a", 1)[0], "topk")[1]["w"].tolist() == [3.0, 0.0]
    assert made.tensors["w"].tolist() == [3.0, 6.0]
    # A restart changes nothing of it.
    again = server(tmp_path, codec="topk")
    assert again.tensors["w"].tolist() == [3.0, 6.0]
    assert again.packets("a", 1) == made.packets("a", 1)


def test_a_site_that_missed_rounds_gets_every_packet_since_or_all_tensors_if_these_are_less(tmp_path: Path):
    start = {"w": torch.zeros(4000)}
    agreed = Agreement("r", start, start.keys(), aggregator("fedavg", 1), Compression(codec="topk-int8", density=0.25))
    made = Server(agreed, {"a": 1.0}, ServerState(tmp_path))
    draw = torch.Generator().manual_seed(0)
    for number in range(1, 21):
        header = Header(run="r", round=number, base=number - 1, sender="a")
        made.receive(encode(header, agreed.contract, {"w": torch.randn(4000, generator=draw)}), "a")
        made.close_round()

    def read(packet: bytes) -> tuple[Header, dict[str, Tensor]]:
        return decode(packet, lambda header: agreed.from_server(header, 1), agreed.contract.tensor_bytes)

    chain = made.packets("a", 17)
    assert [read(packet)[0].base for packet in chain] == [17, 18, 19]
    (whole,) = made.packets("a", 0)
    header, found = read(whole)
    assert header.base is None
    assert torch.equal(found["w"], made.tensors["w"])
    # What is kept is no more than 16,000 bytes of tensors and one packet.
    assert 16_000 < sum(path.stat().st_size for path in tmp_path.glob("packet-*")) < 16_000 + len(chain[0]) * 1.1


def test_a_smaller_rank_gets_and_gives_a_part_of_each_adapter(tmp_path: Path):
    a, b = "l.lora_A.weight", "l.lora_B.weight"
    start = {a: torch.ones(4, 6), b: torch.zeros(5, 4)}
    agreed = Agreement("r", start, start.keys(), aggregator("fedavg", 4), ranks={"small": 2})
    assert agreed.up("small", 1).shapes == {a: (2, 6), b: (5, 2)}
    assert agreed.up("large", 1).shapes == {a: (4, 6), b: (5, 4)}
    made = Server(agreed, {"large": 0.5, "small": 0.5}, ServerState(tmp_path))
    for site, rank in (("large", 4), ("small", 2)):
        header = Header(run="r", round=1, base=0, sender=site)
        made.receive(encode(header, agreed.up(site, 1), {a: torch.ones(rank, 6), b: torch.ones(5, rank)}), site)
    made.close_round()
    # Rows that the small site lacks count as zeros: their mean is a half.
    assert made.tensors[a][:, 0].tolist() == [1.0, 1.0, 0.5, 0.5]
    (packet,) = made.packets("small", 0)
    _, found = decode(packet, lambda header: agreed.from_server(header, 2), agreed.contract.tensor_bytes)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {a: (2, 6), b: (5, 2)}


def test_rounds_are_settled_when_the_best_no_longer_rises():
    rising, flat = [0.1, 0.5, 0.6, 0.7], [0.1, 0.5, None, 0.501, 0.4]
    assert not settled(rising, 2, 0.002)
    assert settled(flat, 2, 0.002)
    assert not settled(flat, 2, 0.0005)
    assert not settled(flat, None, 0.002)
    assert not settled([0.5, 0.5], 2, 0.0)


# θ = 1, mean 3, so Δ = 2; η 0.5, β₁ 0.9, β₂ 0.99, τ 0.1; two rounds with the same Δ, by hand.
STEPS = {
    "none": (3.0, 5.0),
    # m = 2, then 3.8.
    "fedavgm": (1 + 0.5 * 2, 2 + 0.5 * 3.8),
    # m = 0.2, 0.38; v = 0.04, 0.0796.
    "fedadam": (1 + 0.5 * 0.2 / (0.04**0.5 + 0.1), 1 + 0.5 * 0.2 / (0.04**0.5 + 0.1) + 0.5 * 0.38 / (0.0796**0.5 + 0.1)),
    # v = 0 − 0.01 · 4 · sign(0 − 4) = 0.04, then 0.08.
    "fedyogi": (1 + 0.5 * 0.2 / (0.04**0.5 + 0.1), 1 + 0.5 * 0.2 / (0.04**0.5 + 0.1) + 0.5 * 0.38 / (0.08**0.5 + 0.1)),
}


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_server_optimizers_by_hand(name: str):
    options = ServerOptions(optimizer=name, learning_rate=0.5, momentum=0.9, second_moment=0.99, floor=0.1)
    theta, moments = {"w": torch.tensor([1.0])}, {}
    for expected in STEPS[name]:
        theta, moments = server_step(theta, {"w": theta["w"] + 2.0}, moments, options)
        assert theta["w"].item() == pytest.approx(expected, rel=1e-6)


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
