"""Packets: round trips, contracts, and the refusal of invalid packets."""

import hashlib
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save
from torch import Tensor

from flapsam.federation.compression import CODECS
from flapsam.federation.packets import FRAMING_BYTES, MAGIC, Contract, Header, PacketRefused, decode, encode, encode_lossy
from flapsam.run.config import Compression

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([0.5, -1.25])}
CONTRACT = Contract.of(TENSORS)
HEADER = Header(run="r", round=3, sender="site", samples=7, metrics={"loss": 0.5, "dice": None})


def opened(packet: bytes, contract: Contract = CONTRACT) -> tuple[Header, dict[str, Tensor]]:
    return decode(packet, lambda header: contract, contract.tensor_bytes)


def sealed(body: bytes) -> bytes:
    """Add a valid checksum, as a malicious sender would."""
    return MAGIC + hashlib.sha256(body).digest() + body


def compressed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def packed(entries: dict[str, Tensor], **fields: Any) -> bytes:
    """A packet with these entries, even if the contract does not allow them."""
    return sealed(compressed(save(entries, metadata={"flapsam": packed_header(**fields)})))


@pytest.mark.parametrize("name", CODECS)
def test_packets_round_trip(name: str):
    contract = Contract.of(TENSORS, Compression(codec=name, density=0.5))
    packet, sent = encode_lossy(HEADER, contract, TENSORS, seed=3)
    assert packet == encode(HEADER, contract, TENSORS, seed=3)
    header, tensors = opened(packet, contract)
    assert header == HEADER.model_copy(update={"codec": name, "contract": contract.hash})
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], sent[key]) for key in TENSORS)
    if name == "fp32":
        assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)


def test_the_order_of_the_tensors_does_not_change_the_packet():
    assert encode(HEADER, CONTRACT, TENSORS) == encode(HEADER, CONTRACT, dict(reversed(TENSORS.items())))


def test_the_hash_of_a_contract_covers_all_that_was_agreed():
    assert CONTRACT.tensor_bytes == 8 * 4
    others = [
        Contract.of({"a.weight": torch.zeros(3, 2), "b.bias": TENSORS["b.bias"]}),
        Contract.of({"c.weight": TENSORS["a.weight"], "b.bias": TENSORS["b.bias"]}),
        Contract.of({**TENSORS, "b.bias": torch.zeros(2)}),
        Contract.of(TENSORS, Compression(codec="int8")),
        Contract.of(TENSORS, Compression(codec="topk", density=0.1)),
        Contract.of(TENSORS, Compression(codec="topk", density=0.2)),
        CONTRACT.part(["b.bias"]),
    ]
    assert len({contract.hash for contract in [CONTRACT, *others]}) == 8
    assert CONTRACT.part(["b.bias"]).shapes == {"b.bias": (2,)}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "null"])
def test_non_finite_metrics_are_read_as_missing(value: str):
    text = packed_header().replace('"loss":0.5', f'"loss":{value}')
    packet = sealed(compressed(save({"values": VALUES}, metadata={"flapsam": text})))
    assert opened(packet)[0].metrics["loss"] is None
    assert Header(run="r", round=1, sender="s", metrics={"loss": float(value.replace("null", "nan"))}).metrics == {
        "loss": None
    }


def packed_header(**fields: Any) -> str:
    return HEADER.model_copy(update={"codec": "fp32", "contract": CONTRACT.hash, **fields}).model_dump_json()


VALUES = torch.arange(8.0)
GOOD = encode(HEADER, CONTRACT, TENSORS)
PLAIN = save({"values": VALUES}, metadata={"flapsam": HEADER.model_dump_json()})

REFUSED = {
    "empty": (b"", "it is not a flapsam packet"),
    "other file": (b"PK\x03\x04" + bytes(100), "not a flapsam packet"),
    "first format": (b"FLAPSAM1" + GOOD[8:], "need the same version of flapsam"),
    "later format": (b"FLAPSAM3" + GOOD[8:], "need the same version of flapsam"),
    "flipped bit": (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "damaged"),
    "cut short": (GOOD[:-5], "damaged"),
    "no frame": (sealed(b"garbage"), "it cannot be read"),
    "no safetensors": (sealed(compressed(b"garbage")), "it cannot be read"),
    "no header": (sealed(compressed(save({"values": VALUES}))), "it cannot be read"),
    "something after the frame": (sealed(compressed(PLAIN) + b"more"), "it cannot be read"),
    "another frame after it": (sealed(compressed(PLAIN) * 2), "it cannot be read"),
    "frame cut short": (sealed(compressed(PLAIN)[:-8]), "it cannot be read"),
    "odd header": (sealed(compressed(save({"values": VALUES}, metadata={"flapsam": '{"run": 3}'}))), "it cannot be read"),
    "unknown header field": (
        sealed(compressed(save({"values": VALUES}, metadata={"flapsam": HEADER.model_dump_json()[:-1] + ',"x":1}'}))),
        "it cannot be read",
    ),
    "header of a deep nest": (
        sealed(compressed(save({"values": VALUES}, metadata={"flapsam": "[" * 100_000}))),
        "it cannot be read",
    ),
    "bomb": (sealed(compressed(bytes(FRAMING_BYTES + 10**6))), "too large"),
    "undeclared size": (sealed(zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN)), "too large"),
    "other contract": (packed({"values": VALUES}, contract="0"), "another contract"),
    "other codec": (packed({"values": VALUES}, codec="int4"), "it uses codec 'int4', but fp32 was agreed"),
    "missing entry": (packed({}), "'values'"),
    "extra entry": (packed({"values": VALUES, "c": torch.zeros(1)}), "'c'"),
    "too long": (packed({"values": torch.zeros(9)}), "of length 8 was agreed"),
    "other shape": (packed({"values": VALUES.reshape(2, 4)}), "of length 8 was agreed"),
    "other dtype": (packed({"values": VALUES.double()}), "float32 of length 8 was agreed"),
    "not a number": (encode(HEADER, CONTRACT, {**TENSORS, "b.bias": torch.tensor([0.0, torch.nan])}), "NaN or infinity"),
    "infinity": (encode(HEADER, CONTRACT, {**TENSORS, "b.bias": torch.tensor([0.0, torch.inf])}), "NaN or infinity"),
}


@pytest.mark.parametrize(("packet", "reason"), REFUSED.values(), ids=REFUSED)
def test_invalid_packets_are_refused(packet: bytes, reason: str):
    with pytest.raises(PacketRefused, match=reason):
        opened(packet)


def test_a_frame_is_not_decompressed_beyond_its_declared_size():
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(50 << 20)))
    small = zstandard.ZstdCompressor().compress(PLAIN)
    assert zstandard.get_frame_parameters(bytes(frame)).content_size == 50 << 20
    # Single-segment frames keep the content size right after the descriptor. Claim 1000 bytes instead of 50 MiB.
    offset = bytes(frame).index((50 << 20).to_bytes(4, "little"))
    frame[offset : offset + 4] = (1000).to_bytes(4, "little")
    assert len(small) < len(frame)
    with pytest.raises(PacketRefused, match="it cannot be read"):
        opened(sealed(bytes(frame)))


def test_scales_that_multiply_to_infinity_are_refused():
    contract = Contract.of(TENSORS, Compression(codec="int8"))
    largest = torch.finfo(torch.bfloat16).max
    entries = {
        "values": torch.full((8,), 127, dtype=torch.int8),
        "scales": torch.full((3,), largest, dtype=torch.bfloat16),
    }
    with pytest.raises(PacketRefused, match=r"a\.weight holds NaN or infinity"):
        opened(packed(entries, codec="int8", contract=contract.hash), contract)
