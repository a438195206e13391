"""Randomly broken packets pass through the engine. Each is refused in the ledger, and the run completes.

``benchmarks/broken_packets.py`` sends more of them.
"""

import hashlib
import json
import random
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save
from torch import Tensor

from flapsam.base.environment import forget_peak, peak_bytes
from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import Agreement
from flapsam.federation.engines.local import run_rounds
from flapsam.federation.packets import MAGIC, Contract, Header, encode
from flapsam.federation.server import Server
from flapsam.federation.state import ServerState
from flapsam.run.config import Compression, Rounds, Training
from flapsam.run.ledger import Ledger
from flapsam.run.observer import Observer

ROUNDS, BROKEN = 15, 22
CODECS = ["fp32", "steps", "topk-int4"]
"""Rounds × (broken sites + one site that repeats its packet) × codecs = 1,035 packets."""
START = {"l.lora_A.weight": (4, 30), "l.lora_B.weight": (20, 4), "norm": (50,), "conv": (6, 5, 2, 2)}


@dataclass(frozen=True)
class Honest:
    """The packet that an honest site would have sent."""

    header: Header
    contract: Contract
    tensors: dict[str, Tensor]

    @property
    def entries(self) -> dict[str, Tensor]:
        return self.contract.coder.encode(self.tensors, 0)

    @property
    def packet(self) -> bytes:
        return encode(self.header, self.contract, self.tensors)

    def packed(self, entries: dict[str, Tensor] | None = None, text: str | None = None, **fields: Any) -> bytes:
        """Pack other entries, another header, or another text in place of the header."""
        return sealed(compressed(self.content(entries, text, **fields)))

    def content(self, entries: dict[str, Tensor] | None = None, text: str | None = None, **fields: Any) -> bytes:
        text = self.header_text(**fields) if text is None else text
        return save(self.entries if entries is None else entries, metadata={"flapsam": text})

    def header_text(self, **fields: Any) -> str:
        update = {"codec": self.contract.compression.codec, "contract": self.contract.hash, **fields}
        return self.header.model_copy(update=update).model_dump_json()


def sealed(body: bytes) -> bytes:
    return MAGIC + hashlib.sha256(body).digest() + body


def compressed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def flipped(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    return bytes(result) if bytes(result) != data else flipped(data, rng)


def flipped_bits(honest: Honest, rng: random.Random) -> bytes:
    return flipped(honest.packet, rng)


def flipped_bits_in_the_frame(honest: Honest, rng: random.Random) -> bytes:
    """Flip bits inside the frame and compute a valid checksum."""
    while True:
        body = flipped(compressed(honest.content()), rng)
        try:
            # A different frame with the same content would not be a broken packet.
            if zstandard.ZstdDecompressor().decompress(body, max_output_size=1 << 20) != honest.content():
                return sealed(body)
        except (zstandard.ZstdError, MemoryError):
            return sealed(body)


def flipped_bits_in_the_header(honest: Honest, rng: random.Random) -> bytes:
    """Flip bits in safetensors' header: in its length, or in the names, dtypes, shapes and offsets."""
    content = honest.content()
    end = content.index(b"__metadata__") if rng.random() < 0.5 else 8
    offset = rng.randrange(end)
    return sealed(compressed(content[:offset] + flipped(content[offset : offset + 1], rng) + content[offset + 1 :]))


def wrong_length(honest: Honest, rng: random.Random) -> bytes:
    content = honest.content()
    whole = rng.choice([honest.packet, compressed(content), content])
    cut = whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole + rng.randbytes(rng.randint(1, 100))
    return cut if whole == honest.packet else sealed(cut if whole != content else compressed(cut))


def wrong_names(honest: Honest, rng: random.Random) -> bytes:
    entries = honest.entries
    name = rng.choice(sorted(entries))
    kind = rng.randrange(4)
    if kind == 0:
        return honest.packed({**entries, "../../etc/passwd" * rng.randint(1, 50): torch.zeros(1)})
    tensor = entries.pop(name)
    if kind == 1:
        return honest.packed(entries)
    if kind == 2:
        return honest.packed({**entries, name.upper(): tensor})
    field = rng.choice(["run", "round", "base", "sender", "codec", "contract", "samples", "metrics"])
    return honest.packed(text=honest.header_text().replace(f'"{field}"', f'"{field}s"', 1))


def wrong_shapes(honest: Honest, rng: random.Random) -> bytes:
    entries = honest.entries
    name = rng.choice(sorted(entries))
    tensor = entries[name]
    others = [tensor[None], tensor[:, None], tensor[:-1], torch.cat([tensor, tensor]), tensor[:0]]
    return honest.packed({**entries, name: rng.choice(others).contiguous()})


def wrong_dtypes(honest: Honest, rng: random.Random) -> bytes:
    entries = honest.entries
    name = rng.choice(sorted(entries))
    known = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]
    other = rng.choice([dtype for dtype in known if dtype != entries[name].dtype])
    return honest.packed({**entries, name: entries[name].to(other)})


def non_finite_values(honest: Honest, rng: random.Random) -> bytes:
    entries = honest.entries
    floats = sorted(name for name, tensor in entries.items() if tensor.is_floating_point())
    tensor = entries[rng.choice(floats)]
    tensor[rng.randrange(len(tensor))] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return honest.packed(entries)


def noise_in_coded_entries(honest: Honest, rng: random.Random) -> bytes:
    """Put noise into entries that have an encoding of their own. In other entries, noise would be valid."""
    name = {"steps": "values", "topk-int4": "gaps"}.get(honest.contract.compression.codec)
    if name is None:
        return non_finite_values(honest, rng)
    entries = honest.entries
    noise = torch.frombuffer(bytearray(rng.randbytes(rng.randint(1, 2 * len(entries[name])))), dtype=torch.uint8)
    return honest.packed({**entries, name: noise})


def mismatched_header(honest: Honest, rng: random.Random) -> bytes:
    """Name another run, round, base, sender, codec or contract."""
    header = honest.header
    fields: list[dict[str, Any]] = [
        {"run": rng.randbytes(16).hex()},
        {"round": header.round + rng.choice([-1, 1, 1000])},
        {"base": rng.choice([None, header.round, header.round + 7])},
        {"sender": rng.choice(["good", "server", "", "nobody", "\x1b[2J"])},
        {"codec": rng.choice(["zip", "int8", ""])},
        {"contract": rng.randbytes(32).hex()},
    ]
    return honest.packed(**rng.choice(fields))


def odd_header(honest: Honest, rng: random.Random) -> bytes:
    values = [-1, 1 << 80, 1.5, "x", None, [], {}, True, [[[]]], {"a": {"b": 1}}, "9" * 5000]
    tree = json.loads(honest.header_text())
    field = rng.choice(["run", "round", "sender", "samples", "metrics", "codec", "contract"])
    fitting = {"metrics": [{}], "run": ["x"], "sender": ["x"], "codec": ["x"], "contract": ["x"]}.get(field, [])
    tree[field] = rng.choice([value for value in values if value not in fitting])
    odd = ["[" * 100_000, '{"a":' * 50_000, "", "null", "\ud83d".encode("utf-8", "replace").decode(), "9" * 100_000]
    dice = {"validation.mean": rng.choice([-1.0, 1.5, 1e300])}
    kinds = [
        json.dumps(tree),
        rng.choice(odd),
        honest.header_text().replace('"metrics":{', f'"metrics":{json.dumps(dice)[:-1]},'),
    ]
    return honest.packed(text=rng.choice(kinds))


def oversized(honest: Honest, rng: random.Random) -> bytes:
    count = 1 << rng.choice([20, 21, 22])
    kinds = [
        lambda: honest.packed({**honest.entries, "more": torch.zeros(count)}),
        lambda: honest.packed({name: torch.zeros(count, dtype=tensor.dtype) for name, tensor in honest.entries.items()}),
        lambda: honest.packed(text="{" + " " * count + honest.header_text()[1:]),
        lambda: honest.packed(metrics={f"m{i}": 0.0 for i in range(rng.choice([257, 10_000]))}),
        lambda: honest.packed(metrics={"m" * rng.choice([300, 100_000]): 0.0}),
        lambda: honest.packet + bytes(count),
    ]
    return rng.choice(kinds)()


@cache
def zstandard_bomb(declared: bool) -> bytes:
    """Four GiB of zeros in 128 KiB."""
    packer = zstandard.ZstdCompressor(level=1).compressobj(size=4 << 30 if declared else -1)
    chunk = bytes(16 << 20)
    return b"".join([*(packer.compress(chunk) for _ in range(256)), packer.flush()])


@cache
def deflate_bomb() -> bytes:
    """Half a GiB of zeros in half a MiB."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    chunk = bytes(16 << 20)
    return b"".join([*(packer.compress(chunk) for _ in range(32)), packer.flush()])


def zip_bomb(honest: Honest, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return sealed(zstandard_bomb(declared=True))
    if kind == 1:
        return sealed(zstandard_bomb(declared=False))
    if kind == 2:
        return sealed(declaring(zstandard_bomb(declared=True), rng.randint(0, 5000)))
    bomb = torch.frombuffer(bytearray(deflate_bomb()[: rng.choice([400_000, 1 << 30])]), dtype=torch.uint8)
    return honest.packed({name: bomb.clone() for name in honest.entries})


def declaring(frame: bytes, size: int) -> bytes:
    """Return the frame with another content size in its header, in eight bytes."""
    parameters = zstandard.get_frame_parameters(frame)
    body = zstandard.frame_header_size(frame)
    # A single segment, an optional checksum and a size of eight bytes: RFC 8878, section 3.1.1.1.
    return struct.pack("<IBQ", zstandard.MAGIC_NUMBER, 0xE0 | (4 if parameters.has_checksum else 0), size) + frame[body:]


def false_content_size(honest: Honest, rng: random.Random) -> bytes:
    content = honest.content()
    sizes = [0, 1, len(content) - 1, len(content) + 1, len(content) // 2, 2 * len(content), 1 << 20, 1 << 40, (1 << 64) - 3]
    return sealed(declaring(compressed(content), rng.choice(sizes)))


def garbage(honest: Honest, rng: random.Random) -> bytes:
    noise = rng.randbytes(rng.randint(0, 2000))
    return rng.choice([noise, MAGIC + noise, sealed(noise), sealed(compressed(noise))])


KINDS: list[Callable[[Honest, random.Random], bytes]] = [
    flipped_bits,
    flipped_bits_in_the_frame,
    flipped_bits_in_the_header,
    wrong_length,
    wrong_names,
    wrong_shapes,
    wrong_dtypes,
    non_finite_values,
    noise_in_coded_entries,
    mismatched_header,
    odd_header,
    oversized,
    zip_bomb,
    false_content_size,
    garbage,
]


class Timed(Server):
    slowest = 0.0

    def receive(self, packet: bytes, site: str) -> Header:
        began = time.perf_counter()
        try:
            return super().receive(packet, site)
        finally:
            self.slowest = max(self.slowest, time.perf_counter() - began)


class Site:
    """A stand-in for a client: an honest one that answers at once, or one that breaks each of its answers."""

    def __init__(self, name: str, server: Server, rng: random.Random | None, rounds: int) -> None:
        self.server, self.rng = server, rng
        self.data = SimpleNamespace(site=name, train=[])
        self.config = SimpleNamespace(rounds=Rounds(count=rounds), training=Training())
        self.earlier: list[bytes] = []

    @property
    def held(self) -> int:
        return self.server.rounds_done

    def fit(self, packets: list[bytes], on_step: Callable[[], None]) -> bytes:
        number, site = self.server.rounds_done + 1, self.data.site
        agreement = self.server.agreement
        metrics: dict[str, float | None] = {"loss": 0.5, "steps": 10.0}
        header = Header(run=agreement.run, round=number, base=number - 1, sender=site, samples=7, metrics=metrics)
        contract = agreement.up(site, number)
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in contract.shapes.items()}
        honest = Honest(header, contract, tensors)
        if self.rng is None:
            return honest.packet
        if self.earlier and self.rng.random() < 0.05:
            return self.rng.choice(self.earlier)
        self.earlier.append(honest.packet)
        return self.rng.choice(KINDS)(honest, self.rng)

    def validate(self, packets: list[bytes]) -> dict[str, float | None]:
        return {}


@pytest.mark.no_cover
@pytest.mark.parametrize("codec", CODECS)
def test_every_broken_packet_is_refused(codec: str, tmp_path: Path):
    send_broken_packets(codec, ROUNDS, tmp_path)


def send_broken_packets(codec: str, rounds: int, folder: Path) -> int:
    """Send broken packets for so many rounds, check that each is refused, and return their number."""
    # Build the bombs before memory is measured.
    for build in (lambda: zstandard_bomb(declared=True), lambda: zstandard_bomb(declared=False), deflate_bomb):
        build()
    torch.set_num_threads(1)
    start = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in START.items()}
    agreement = Agreement("run", start, start.keys(), aggregator("flexlora-aligned", 4), Compression(codec=codec))
    broken = [f"site_{index:02}" for index in range(BROKEN)]
    server = Timed(agreement, dict.fromkeys(["good", *broken], 1.0), ServerState(folder / "state"))
    rng = random.Random(0)
    good = Site("good", server, None, rounds)
    # The honest site answers first, then the broken sites, then the honest site again with the same packet.
    sites = [good, *(Site(name, server, rng, rounds) for name in broken), good]
    forget_peak()
    before = peak_bytes()
    run_rounds("federated", server, sites, Ledger(folder / "events.jsonl"), Observer())  # type: ignore[arg-type]
    after = peak_bytes()
    # Parse strictly, because NaN is not valid JSON.
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the ledger")) for line in lines]
    refused = [event for event in events if event["event"] == "refused"]
    assert len(refused) == rounds * (BROKEN + 1)
    assert all(len(event["reason"]) < 500 for event in refused)
    assert [(event["round"], event["site"]) for event in events if event["event"] == "fit"] == [
        (number, "good") for number in range(1, rounds + 1)
    ]
    assert server.rounds_done == rounds
    assert server.slowest < 1
    if before is not None and after is not None:
        assert after - before < 1 << 30
    return len(refused)
