"""The server's and the clients' state, without an engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import SERVER, Agreement
from flapsam.federation.packets import Contract, Header, PacketRefused, decode, encode
from flapsam.federation.rounds import settled
from flapsam.federation.server import UNKNOWN, Server
from flapsam.federation.server_optimizers import SERVER_OPTIMIZERS, server_step
from flapsam.federation.state import ClientState, ServerState
from flapsam.run.config import Compression, ServerOptions

START = {"w": torch.zeros(2)}


def agreement(run: str = "r", codec: str = "fp32", **fields: object) -> Agreement:
    return Agreement(run, START, START.keys(), aggregator("fedavg", 1), Compression(codec=codec, density=0.5), **fields)  # type: ignore[arg-type]


def make_server(folder: Path, run: str = "r", codec: str = "fp32") -> Server:
    return Server(agreement(run, codec), {"a": 0.25, "b": 0.75}, ServerState(folder))


def reply(
    sender: str, value: float, *, run: str = "r", number: int = 1, contract: Contract | None = None, **fields: Any
) -> bytes:
    header = Header(run=run, round=number, base=number - 1, sender=sender, **fields)
    return encode(header, contract or agreement().contract, {"w": torch.full((2,), value)})


def opened(packet: bytes, codec: str = "fp32") -> tuple[Header, dict[str, Tensor]]:
    """Decode a packet from the server."""
    agreed = agreement(codec=codec)
    return decode(packet, lambda header: agreed.from_server(header, 1), agreed.contract.tensor_bytes)


def tensors(server: Server) -> dict[str, Tensor]:
    """The tensors that a site receives in the newest packet."""
    (packet,) = server.packets("a", server.rounds_done - 1)
    return opened(packet)[1]


def test_a_round_aggregates_the_replies(tmp_path: Path):
    server = make_server(tmp_path)
    server.receive(reply("b", 4.0), "b")
    server.receive(reply("a", 8.0), "a")
    assert server.close_round() == 1
    assert tensors(server)["w"].tolist() == [5.0, 5.0]  # 0.25 · 8 + 0.75 · 4
    header = opened(server.packets("a", 0)[0])[0]
    assert (header.round, header.sender, header.run) == (1, SERVER, "r")


def test_the_first_packet_carries_no_tensors(tmp_path: Path):
    (packet,) = make_server(tmp_path).packets("a", 0)
    header, received = opened(packet)
    assert (header.round, header.base, received) == (0, 0, {})


def test_weights_are_normalised_over_the_sites_that_answered(tmp_path: Path):
    server = make_server(tmp_path)
    server.receive(reply("a", 8.0), "a")
    server.close_round()
    assert tensors(server)["w"].tolist() == [8.0, 8.0]


REFUSED = {
    "other run": (reply("a", 1.0, run="x"), "it belongs to another run"),
    "stranger": (reply("c", 1.0), "its sender is 'c', which is not a site of this run"),
    "other site": (reply("b", 1.0), "its sender is 'b', but it came from 'a'"),
    "early": (reply("a", 1.0, number=2), "it answers round 2, but the current round is 1"),
    "other contract": (reply("a", 1.0, contract=Contract({"w": (2,)})), "another contract"),
    "not a number": (reply("a", float("nan")), "NaN"),
    "Dice above 1": (reply("a", 1.0, metrics={"validation.mean": 1.5}), "a Dice is a number between 0 and 1"),
    "negative loss": (reply("a", 1.0, metrics={"loss": -1.0}), "its loss is not a number between 0 and 1e\\+12"),
    "too many steps": (reply("a", 1.0, metrics={"steps": 1e300}), "its steps is not a number"),
    "own metric": (reply("a", 1.0, metrics={"spy": 1.0}), "a metric that was not asked for"),
}


@pytest.mark.parametrize(("packet", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_reply_is_refused_and_the_round_continues(packet: bytes, reason: str, tmp_path: Path):
    server = make_server(tmp_path)
    with pytest.raises(PacketRefused, match=reason):
        server.receive(packet, "a")
    server.receive(reply("b", 4.0), "b")
    server.close_round()
    assert tensors(server)["w"].tolist() == [4.0, 4.0]


def test_a_late_reply_is_refused(tmp_path: Path):
    server = make_server(tmp_path)
    server.receive(reply("a", 1.0), "a")
    server.close_round()
    with pytest.raises(PacketRefused, match="it answers round 1, but the current round is 2"):
        server.receive(reply("b", 1.0), "b")


def test_a_repeated_reply_is_refused(tmp_path: Path):
    server = make_server(tmp_path)
    server.receive(reply("a", 1.0), "a")
    with pytest.raises(PacketRefused, match="a has already answered this round"):
        server.receive(reply("a", 2.0), "a")


def test_a_round_without_replies_cannot_be_closed(tmp_path: Path):
    with pytest.raises(FlapsamError, match="round 1: no site"):
        make_server(tmp_path).close_round()


def test_a_restarted_server_resumes_after_its_last_round(tmp_path: Path):
    first = make_server(tmp_path)
    first.receive(reply("a", 8.0), "a")
    first.close_round()
    first.receive(reply("a", 16.0, number=2), "a")
    second = make_server(tmp_path)
    assert second.rounds_done == 1
    assert second.tensors["w"].tolist() == [8.0, 8.0]
    # Clients send their replies of the open round again.
    second.receive(reply("a", 16.0, number=2), "a")


def test_a_server_does_not_resume_another_run(tmp_path: Path):
    make_server(tmp_path)
    with pytest.raises(FlapsamError, match="another run"):
        make_server(tmp_path, run="other")


def change(site: str, number: int, values: list[float]) -> bytes:
    """Encode a client's packet. With ``topk`` at a density of 0.5, only the larger of the two values travels."""
    header = Header(run="r", round=number, base=number - 1, sender=site)
    return encode(header, agreement(codec="topk").contract, {"w": torch.tensor(values)})


def test_the_compression_error_is_sent_with_the_next_packet(tmp_path: Path):
    server = make_server(tmp_path, codec="topk")
    server.receive(change("a", 1, [4.0, 0.0]), "a")
    server.receive(change("b", 1, [0.0, 8.0]), "b")
    server.close_round()
    # The mean is 0.25 · (4, 0) + 0.75 · (0, 8) = (1, 6). Only the 6 travels.
    assert opened(server.packets("a", 0)[0], "topk")[1]["w"].tolist() == [0.0, 6.0]
    assert server.tensors["w"].tolist() == [0.0, 6.0]
    assert server.globals["w"].tolist() == [1.0, 6.0]
    server.receive(change("b", 2, [2.0, 0.0]), "b")
    server.close_round()
    # The global tensors are (3, 6) and the sites have (0, 6), so the 3 travels.
    assert opened(server.packets("a", 1)[0], "topk")[1]["w"].tolist() == [3.0, 0.0]
    assert server.tensors["w"].tolist() == [3.0, 6.0]
    # A restart changes nothing.
    restarted = make_server(tmp_path, codec="topk")
    assert restarted.tensors["w"].tolist() == [3.0, 6.0]
    assert restarted.packets("a", 1) == server.packets("a", 1)


def test_a_site_that_missed_rounds_gets_the_missed_packets_or_all_tensors_if_smaller(tmp_path: Path):
    start = {"w": torch.zeros(4000)}
    agreed = Agreement("r", start, start.keys(), aggregator("fedavg", 1), Compression(codec="topk-int8", density=0.25))
    server = Server(agreed, {"a": 1.0}, ServerState(tmp_path))
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 21):
        header = Header(run="r", round=number, base=number - 1, sender="a")
        server.receive(encode(header, agreed.contract, {"w": torch.randn(4000, generator=generator)}), "a")
        server.close_round()

    def read(packet: bytes) -> tuple[Header, dict[str, Tensor]]:
        return decode(packet, lambda header: agreed.from_server(header, 1), agreed.contract.tensor_bytes)

    chain = server.packets("a", 17)
    assert [read(packet)[0].base for packet in chain] == [17, 18, 19]
    (whole,) = server.packets("a", 0)
    header, received = read(whole)
    assert header.base is None
    assert torch.equal(received["w"], server.tensors["w"])
    # The server keeps no more than 16,000 bytes of tensors and one packet.
    assert 16_000 < sum(path.stat().st_size for path in tmp_path.glob("packet-*")) < 16_000 + len(chain[0]) * 1.1


def test_a_site_with_a_smaller_rank_exchanges_part_of_each_adapter(tmp_path: Path):
    a, b = "l.lora_A.weight", "l.lora_B.weight"
    start = {a: torch.ones(4, 6), b: torch.zeros(5, 4)}
    agreed = Agreement("r", start, start.keys(), aggregator("fedavg", 4), ranks={"small": 2})
    assert agreed.up("small", 1).shapes == {a: (2, 6), b: (5, 2)}
    assert agreed.up("large", 1).shapes == {a: (4, 6), b: (5, 4)}
    server = Server(agreed, {"large": 0.5, "small": 0.5}, ServerState(tmp_path))
    for site, rank in (("large", 4), ("small", 2)):
        header = Header(run="r", round=1, base=0, sender=site)
        server.receive(encode(header, agreed.up(site, 1), {a: torch.ones(rank, 6), b: torch.ones(5, rank)}), site)
    server.close_round()
    # Rows that the small site lacks count as zeros, so their mean is 0.5.
    assert server.tensors[a][:, 0].tolist() == [1.0, 1.0, 0.5, 0.5]
    (packet,) = server.packets("small", 0)
    _, received = decode(packet, lambda header: agreed.from_server(header, 2), agreed.contract.tensor_bytes)
    assert {name: tuple(tensor.shape) for name, tensor in received.items()} == {a: (2, 6), b: (5, 2)}


def test_a_run_is_settled_when_its_best_score_no_longer_rises():
    rising, flat = [{"a": 0.1}, {"a": 0.5}, {"a": 0.6}, {"a": 0.7}], [{"a": v} for v in (0.1, 0.5, None, 0.501, 0.4)]
    assert not settled(rising, 2, 0.002)
    assert settled(flat, 2, 0.002)
    assert not settled(flat, 2, 0.0005)
    assert not settled(flat, None, 0.002)
    assert not settled([{"a": 0.5}, {"a": 0.5}], 2, 0.0)
    assert not settled([], 1, 0.0) and not settled([{"a": None}] * 9, 1, 0.0)


RISING, FLAT = (0.1, 0.3, 0.5, 0.7), (0.5, 0.5, 0.5, 0.5)
LIES = {"always 1": (1, 1, 1, 1), "suddenly 1": (0, 0, 0, 1), "suddenly 0": (1, 0, 0, 0), "nothing": (None,) * 4}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize(("honest", "over"), [((RISING, RISING), False), ((FLAT, FLAT), True)], ids=["rising", "flat"])
def test_a_false_dice_neither_ends_nor_prolongs_a_run(honest: tuple, over: bool, lie: tuple):
    """The medians of the values in the rounds would be 0.1, 0.3, 0.5, 0.5 if the first site were flat from the second on."""
    curves = dict(zip("abc", (*honest, lie), strict=True))
    validation = [{site: curve[number] for site, curve in curves.items()} for number in range(4)]
    assert settled(validation, 1, 0.002) == over


@pytest.mark.parametrize(
    ("curves", "over"),
    [((FLAT, RISING), False), ((FLAT, FLAT), True), ((FLAT, FLAT, RISING), True), ((FLAT, FLAT, RISING, RISING), False)],
)
def test_more_than_half_of_the_sites_must_have_settled(curves: tuple, over: bool):
    validation = [{str(site): curve[number] for site, curve in enumerate(curves)} for number in range(4)]
    assert settled(validation, 1, 0.002) == over


# Computed by hand for two rounds with the same Δ = 2: θ = 1, mean 3, η = 0.5, β₁ = 0.9, β₂ = 0.99, τ = 0.1.
STEPS = {
    "none": (3.0, 5.0),
    # m is 2, then 3.8.
    "fedavgm": (1 + 0.5 * 2, 2 + 0.5 * 3.8),
    # m is 0.2, then 0.38. v is 0.04, then 0.0796.
    "fedadam": (1 + 0.5 * 0.2 / (0.04**0.5 + 0.1), 1 + 0.5 * 0.2 / (0.04**0.5 + 0.1) + 0.5 * 0.38 / (0.0796**0.5 + 0.1)),
    # v is 0 − 0.01 · 4 · sign(0 − 4) = 0.04, then 0.08.
    "fedyogi": (1 + 0.5 * 0.2 / (0.04**0.5 + 0.1), 1 + 0.5 * 0.2 / (0.04**0.5 + 0.1) + 0.5 * 0.38 / (0.08**0.5 + 0.1)),
}


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_server_optimizers_match_hand_calculations(name: str):
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


def test_a_client_keeps_what_a_repeated_round_needs_and_no_reply_to_another_start(tmp_path: Path):
    state = ClientState(tmp_path, keep=2)
    for number in (1, 2, 3, 4, 5):
        state.moments(number).write_bytes(b"%d" % number)
        state.commit(number, b"reply %d" % number, origin="aa")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"moments-00000{number}.safetensors" for number in (3, 4, 5)),
        "reply-000005-aa.packet",
    ]
    assert (state.reply(5, "aa"), state.reply(5, "bb"), state.reply(4, "aa")) == (b"reply 5", None, None)
    # Round 4 is repeated, so what came of it and of later rounds is dropped.
    state.forget_from(4)
    newest = state.moments_before(9)
    assert newest is not None and newest.read_bytes() == b"3"


def test_a_reply_of_an_earlier_version_is_still_sent(tmp_path: Path):
    ClientState(tmp_path).commit(2, b"reply")
    assert ClientState(tmp_path).reply(2, "aa") == b"reply"


def test_a_state_of_an_earlier_version_resumes(tmp_path: Path):
    """It kept the mean of the sites' Dice, which now stands for each site."""
    server = make_server(tmp_path)
    server._commit(1, server.globals, server.held, {}, [None, 0.5])  # type: ignore[list-item]
    assert make_server(tmp_path).validation == [{"a": None, "b": None}, {"a": 0.5, "b": 0.5}]


def test_a_site_that_may_hold_a_dropped_result_gets_all_tensors(tmp_path: Path):
    server = make_server(tmp_path, codec="topk")
    for number in (1, 2):
        server.receive(change("a", number, [4.0, 0.0]), "a")
        server.close_round()
    (packet,) = server.packets("a", UNKNOWN)
    header, received = opened(packet, "topk")
    assert (header.base, received["w"].tolist()) == (None, [8.0, 0.0])


def test_moments_survive_a_round_that_saves_none(tmp_path: Path):
    state = ClientState(tmp_path)
    state.moments(1).write_bytes(b"1")
    state.commit(1, b"")
    state.commit(2, b"")
    newest = state.moments_before(3)
    assert newest is not None and newest.read_bytes() == b"1"
