import hashlib

import pytest
import torch
import zstandard
from safetensors.torch import save

from flapsam.federation.packets import FRAMING_BYTES, MAGIC, Contract, Header, PacketRefused, decode, encode

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([0.5, -1.25])}
CONTRACT = Contract.of(TENSORS)
HEADER = Header(run="r", round=3, sender="site", contract=CONTRACT.hash, samples=7, metrics={"loss": 0.5, "dice": None})


def sealed(body: bytes) -> bytes:
    """Bytes with a right checksum, as a malicious sender would make them."""
    return MAGIC + hashlib.sha256(body).digest() + body


def compressed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def test_round_trip():
    header, tensors = decode(encode(HEADER, TENSORS), CONTRACT)
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_same_input_gives_the_same_bytes():
    assert encode(HEADER, TENSORS) == encode(HEADER, dict(reversed(TENSORS.items())))


def test_the_contract_counts_names_and_shapes():
    assert CONTRACT.tensor_bytes == 8 * 4
    assert Contract.of({"a.weight": torch.zeros(3, 2), "b.bias": torch.zeros(2)}).hash != CONTRACT.hash


def test_not_a_number_in_the_metrics_is_left_open():
    header = HEADER.model_copy(update={"metrics": {"loss": float("nan")}})
    assert decode(encode(header, TENSORS), CONTRACT)[0].metrics == {"loss": None}


REFUSED = {
    "empty": (b"", "not a flapsam packet"),
    "other file": (b"PK\x03\x04" + bytes(100), "not a flapsam packet"),
    "flipped bit": (encode(HEADER, TENSORS)[:-1] + b"\0", "damaged"),
    "cut short": (encode(HEADER, TENSORS)[:-5], "damaged"),
    "no frame": (sealed(b"garbage"), "not readable"),
    "no safetensors": (sealed(compressed(b"garbage")), "not readable"),
    "no header": (sealed(compressed(save(TENSORS))), "not readable"),
    "frame cut short": (sealed(compressed(save(TENSORS))[:-8]), "not readable"),
    "odd header": (sealed(compressed(save(TENSORS, metadata={"flapsam": '{"run": 3}'}))), "not readable"),
    "unknown header field": (
        sealed(compressed(save(TENSORS, metadata={"flapsam": HEADER.model_dump_json()[:-1] + ',"x":1}'}))),
        "not readable",
    ),
    "bomb": (sealed(compressed(bytes(FRAMING_BYTES + 10**6))), "too large"),
    "undeclared size": (sealed(zstandard.ZstdCompressor(write_content_size=False).compress(save(TENSORS))), "too large"),
    "other contract": (encode(HEADER.model_copy(update={"contract": "0"}), TENSORS), "another contract"),
    "other codec": (encode(HEADER.model_copy(update={"codec": "int4"}), TENSORS), "codec 'int4'"),
    "missing tensor": (encode(HEADER, {"b.bias": TENSORS["b.bias"]}), "a.weight"),
    "extra tensor": (encode(HEADER, {**TENSORS, "c": torch.zeros(1)}), "'c'"),
    "wrong shape": (encode(HEADER, {**TENSORS, "b.bias": torch.zeros(3)}), "agreed was"),
    "wrong dtype": (encode(HEADER, {**TENSORS, "b.bias": torch.zeros(2, dtype=torch.float64)}), "agreed was"),
    "not a number": (encode(HEADER, {**TENSORS, "b.bias": torch.tensor([0.0, torch.nan])}), "NaN or infinity"),
    "infinity": (encode(HEADER, {**TENSORS, "b.bias": torch.tensor([0.0, torch.inf])}), "NaN or infinity"),
}


@pytest.mark.parametrize(("packet", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(packet: bytes, reason: str):
    with pytest.raises(PacketRefused, match=reason):
        decode(packet, CONTRACT)


def test_a_frame_that_lies_about_its_size_is_not_unpacked_beyond_it():
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(50 << 20)))
    small = zstandard.ZstdCompressor().compress(save(TENSORS))
    assert zstandard.get_frame_parameters(bytes(frame)).content_size == 50 << 20
    # Single-segment frames keep the content size right after the descriptor; claim 1000 bytes instead of 50 MiB.
    at = bytes(frame).index((50 << 20).to_bytes(4, "little"))
    frame[at : at + 4] = (1000).to_bytes(4, "little")
    assert len(small) < len(frame)
    with pytest.raises(PacketRefused, match="not readable"):
        decode(sealed(bytes(frame)), CONTRACT)
