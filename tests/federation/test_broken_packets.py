"""Ten thousand packets broken at random, through the engine: each is refused in a line of the ledger; rounds go on."""

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

ROUNDS, BROKEN = 145, 22
CODECS = ["fp32", "steps", "topk-int4"]
"""Rounds × (broken sites + one that repeats itself) × codecs: 10,005 packets."""
START = {"l.lora_A.weight": (4, 30), "l.lora_B.weight": (20, 4), "norm": (50,), "conv": (6, 5, 2, 2)}


@dataclass(frozen=True)
class Honest:
    """What a site would have sent."""

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
        """With other entries, another header, or another text in the header's place."""
        return sealed(compressed(self.content(entries, text, **fields)))

    def content(self, entries: dict[str, Tensor] | None = None, text: str | None = None, **fields: Any) -> bytes:
        text = self.header_text(**fields) if text is None else text
        return save(self.entries if entries is None else entries, metadata={"flapsam": text})

    def header_text(self, **fields: Any) -> str:
        told = {"codec": self.contract.compression.codec, "contract": self.contract.hash, **fields}
        return self.header.model_copy(update=told).model_dump_json()


def sealed(body: bytes) -> bytes:
    return MAGIC + hashlib.sha256(body).digest() + body


def compressed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def flipped(data: bytes, draw: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        result[draw.randrange(len(result))] ^= 1 << draw.randrange(8)
    return bytes(result) if bytes(result) != data else flipped(data, draw)


def bits(honest: Honest, draw: random.Random) -> bytes:
    return flipped(honest.packet, draw)


def bits_in_the_frame(honest: Honest, draw: random.Random) -> bytes:
    """With a right checksum around them."""
    while True:
        body = flipped(compressed(honest.content()), draw)
        try:
            # The same content in another frame would be no broken packet.
            if zstandard.ZstdDecompressor().decompress(body, max_output_size=1 << 20) != honest.content():
                return sealed(body)
        except (zstandard.ZstdError, MemoryError):
            return sealed(body)


def bits_in_the_index(honest: Honest, draw: random.Random) -> bytes:
    """In the length and the names, dtypes, shapes and places that safetensors tells."""
    content = honest.content()
    end = content.index(b"__metadata__") if draw.random() < 0.5 else 8
    place = draw.randrange(end)
    return sealed(compressed(content[:place] + flipped(content[place : place + 1], draw) + content[place + 1 :]))


def length(honest: Honest, draw: random.Random) -> bytes:
    content = honest.content()
    whole = draw.choice([honest.packet, compressed(content), content])
    cut = whole[: draw.randrange(len(whole))] if draw.random() < 0.5 else whole + draw.randbytes(draw.randint(1, 100))
    return cut if whole == honest.packet else sealed(cut if whole != content else compressed(cut))


def names(honest: Honest, draw: random.Random) -> bytes:
    entries = honest.entries
    name = draw.choice(sorted(entries))
    kind = draw.randrange(4)
    if kind == 0:
        return honest.packed({**entries, "../../etc/passwd" * draw.randint(1, 50): torch.zeros(1)})
    tensor = entries.pop(name)
    if kind == 1:
        return honest.packed(entries)
    if kind == 2:
        return honest.packed({**entries, name.upper(): tensor})
    field = draw.choice(["run", "round", "base", "sender", "codec", "contract", "samples", "metrics"])
    return honest.packed(text=honest.header_text().replace(f'"{field}"', f'"{field}s"', 1))


def shapes(honest: Honest, draw: random.Random) -> bytes:
    entries = honest.entries
    name = draw.choice(sorted(entries))
    tensor = entries[name]
    others = [tensor[None], tensor[:, None], tensor[:-1], torch.cat([tensor, tensor]), tensor[:0]]
    return honest.packed({**entries, name: draw.choice(others).contiguous()})


def dtypes(honest: Honest, draw: random.Random) -> bytes:
    entries = honest.entries
    name = draw.choice(sorted(entries))
    known = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]
    other = draw.choice([dtype for dtype in known if dtype != entries[name].dtype])
    return honest.packed({**entries, name: entries[name].to(other)})


def not_numbers(honest: Honest, draw: random.Random) -> bytes:
    entries = honest.entries
    floats = sorted(name for name, tensor in entries.items() if tensor.is_floating_point())
    tensor = entries[draw.choice(floats)]
    tensor[draw.randrange(len(tensor))] = draw.choice([torch.nan, torch.inf, -torch.inf])
    return honest.packed(entries)


def noise_in_what_is_coded(honest: Honest, draw: random.Random) -> bytes:
    """Where a codec has codes of its own; elsewhere noise is numbers as good as any."""
    name = {"steps": "values", "topk-int4": "gaps"}.get(honest.contract.compression.codec)
    if name is None:
        return not_numbers(honest, draw)
    entries = honest.entries
    noise = torch.frombuffer(bytearray(draw.randbytes(draw.randint(1, 2 * len(entries[name])))), dtype=torch.uint8)
    return honest.packed({**entries, name: noise})


def another(honest: Honest, draw: random.Random) -> bytes:
    """Of another run, round, base, sender, codec or contract."""
    header = honest.header
    fields: list[dict[str, Any]] = [
        {"run": draw.randbytes(16).hex()},
        {"round": header.round + draw.choice([-1, 1, 1000])},
        {"base": draw.choice([None, header.round, header.round + 7])},
        {"sender": draw.choice(["good", "server", "", "nobody", "\x1b[2J"])},
        {"codec": draw.choice(["zip", "int8", ""])},
        {"contract": draw.randbytes(32).hex()},
    ]
    return honest.packed(**draw.choice(fields))


def odd_header(honest: Honest, draw: random.Random) -> bytes:
    values = [-1, 1 << 80, 1.5, "x", None, [], {}, True, [[[]]], {"a": {"b": 1}}, "9" * 5000]
    tree = json.loads(honest.header_text())
    field = draw.choice(["run", "round", "sender", "samples", "metrics", "codec", "contract"])
    fitting = {"metrics": [{}], "run": ["x"], "sender": ["x"], "codec": ["x"], "contract": ["x"]}.get(field, [])
    tree[field] = draw.choice([value for value in values if value not in fitting])
    odd = ["[" * 100_000, '{"a":' * 50_000, "", "null", "\ud83d".encode("utf-8", "replace").decode(), "9" * 100_000]
    dice = {"validation.mean": draw.choice([-1.0, 1.5, 1e300])}
    kinds = [
        json.dumps(tree),
        draw.choice(odd),
        honest.header_text().replace('"metrics":{', f'"metrics":{json.dumps(dice)[:-1]},'),
    ]
    return honest.packed(text=draw.choice(kinds))


def oversized(honest: Honest, draw: random.Random) -> bytes:
    count = 1 << draw.choice([20, 21, 22])
    kinds = [
        lambda: honest.packed({**honest.entries, "more": torch.zeros(count)}),
        lambda: honest.packed({name: torch.zeros(count, dtype=tensor.dtype) for name, tensor in honest.entries.items()}),
        lambda: honest.packed(text="{" + " " * count + honest.header_text()[1:]),
        lambda: honest.packed(metrics={f"m{i}": 0.0 for i in range(draw.choice([257, 10_000]))}),
        lambda: honest.packed(metrics={"m" * draw.choice([300, 100_000]): 0.0}),
        lambda: honest.packet + bytes(count),
    ]
    return draw.choice(kinds)()


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


def zip_bomb(honest: Honest, draw: random.Random) -> bytes:
    kind = draw.randrange(4)
    if kind == 0:
        return sealed(zstandard_bomb(declared=True))
    if kind == 1:
        return sealed(zstandard_bomb(declared=False))
    if kind == 2:
        return sealed(declaring(zstandard_bomb(declared=True), draw.randint(0, 5000)))
    bomb = torch.frombuffer(bytearray(deflate_bomb()[: draw.choice([400_000, 1 << 30])]), dtype=torch.uint8)
    return honest.packed({name: bomb.clone() for name in honest.entries})


def declaring(frame: bytes, size: int) -> bytes:
    """The frame with another content size in its head, in eight bytes."""
    found = zstandard.get_frame_parameters(frame)
    head = zstandard.frame_header_size(frame)
    # One segment, checksum or not, eight bytes of size: RFC 8878, 3.1.1.1.
    return struct.pack("<IBQ", zstandard.MAGIC_NUMBER, 0xE0 | (4 if found.has_checksum else 0), size) + frame[head:]


def lying_frame(honest: Honest, draw: random.Random) -> bytes:
    content = honest.content()
    sizes = [0, 1, len(content) - 1, len(content) + 1, len(content) // 2, 2 * len(content), 1 << 20, 1 << 40, (1 << 64) - 3]
    return sealed(declaring(compressed(content), draw.choice(sizes)))


def rubbish(honest: Honest, draw: random.Random) -> bytes:
    noise = draw.randbytes(draw.randint(0, 2000))
    return draw.choice([noise, MAGIC + noise, sealed(noise), sealed(compressed(noise))])


KINDS: list[Callable[[Honest, random.Random], bytes]] = [
    bits,
    bits_in_the_frame,
    bits_in_the_index,
    length,
    names,
    shapes,
    dtypes,
    not_numbers,
    noise_in_what_is_coded,
    another,
    odd_header,
    oversized,
    zip_bomb,
    lying_frame,
    rubbish,
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
    """In a client's place: an honest one that answers at once, or one that breaks each of its answers."""

    def __init__(self, name: str, server: Server, draw: random.Random | None) -> None:
        self.server, self.draw = server, draw
        self.data = SimpleNamespace(site=name, train=[])
        self.config = SimpleNamespace(rounds=Rounds(count=ROUNDS), training=Training())
        self.earlier: list[bytes] = []

    @property
    def held(self) -> int:
        return self.server.rounds_done

    def fit(self, packets: list[bytes], on_step: Callable[[], None]) -> bytes:
        number, site = self.server.rounds_done + 1, self.data.site
        agreement = self.server.agreement
        told: dict[str, float | None] = {"loss": 0.5, "steps": 10.0}
        header = Header(run=agreement.run, round=number, base=number - 1, sender=site, samples=7, metrics=told)
        contract = agreement.up(site, number)
        noise = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(shape, generator=noise) for name, shape in contract.shapes.items()}
        honest = Honest(header, contract, tensors)
        if self.draw is None:
            return honest.packet
        if self.earlier and self.draw.random() < 0.05:
            return self.draw.choice(self.earlier)
        self.earlier.append(honest.packet)
        return self.draw.choice(KINDS)(honest, self.draw)

    def validate(self, packets: list[bytes]) -> dict[str, float | None]:
        return {}


@pytest.mark.parametrize("codec", CODECS)
def test_broken_packets_are_refused_one_by_one(codec: str, tmp_path: Path):
    # Made before memory is measured.
    for make in (lambda: zstandard_bomb(declared=True), lambda: zstandard_bomb(declared=False), deflate_bomb):
        make()
    torch.set_num_threads(1)
    start = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in START.items()}
    agreement = Agreement("run", start, start.keys(), aggregator("flexlora-aligned", 4), Compression(codec=codec))
    broken = [f"site_{index:02}" for index in range(BROKEN)]
    server = Timed(agreement, dict.fromkeys(["good", *broken], 1.0), ServerState(tmp_path / "state"))
    draw = random.Random(0)
    good = Site("good", server, None)
    # The honest site comes first, then those that break theirs, then the honest one's packet once more.
    sites = [good, *(Site(name, server, draw) for name in broken), good]
    forget_peak()
    before = peak_bytes()
    run_rounds("federated", server, sites, Ledger(tmp_path / "events.jsonl"), Observer())  # type: ignore[arg-type]
    after = peak_bytes()
    # Strict: NaN is no JSON.
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the ledger")) for line in lines]
    refused = [event for event in events if event["event"] == "refused"]
    assert len(refused) == ROUNDS * (BROKEN + 1)
    assert all(len(event["reason"]) < 500 for event in refused)
    assert [(event["round"], event["site"]) for event in events if event["event"] == "fit"] == [
        (number, "good") for number in range(1, ROUNDS + 1)
    ]
    assert server.rounds_done == ROUNDS
    assert server.slowest < 1
    if before is not None and after is not None:
        assert after - before < 1 << 30
