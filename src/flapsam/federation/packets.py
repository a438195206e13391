"""The packet, in which tensors travel between the server and the sites.

A packet consists of ``FLAPSAM2``, whose digit is the format's version, the SHA-256 (32 bytes) of everything that follows,
and one zstandard frame. The frame holds a safetensors file with a codec's entries. The file's metadata has one entry,
``flapsam``: the header as JSON. Nothing in a packet is trusted before it is checked.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from math import isfinite
from typing import Annotated

import torch
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flapsam.federation.compression import codec
from flapsam.federation.compression.codec import Codec
from flapsam.run.config import Compression

NAME = b"FLAPSAM"
MAGIC = NAME + b"2"
ENTRY = "flapsam"
SMALL = 8 << 20
"""Content up to this size in bytes is compressed at zstandard's level 19, which saves a few per cent. Larger content is
compressed at level 1."""
PIECE = 1 << 12
"""Number of bytes decompressed at a time."""
HEADER_BYTES = 1 << 16
"""Maximum size of the header and the safetensors index together."""
FRAMING_BYTES = 1 << 20
"""Maximum size of everything but the tensors' own bytes: the header, and a codec's scales and gaps."""


class PacketRefused(Exception):  # noqa: N818 (it is a verdict for the ledger)
    """A packet is not used. The message is the reason and completes "the packet is refused: …"."""


class Header(BaseModel):
    """What a packet says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: str = Field(max_length=64)
    round: int = Field(ge=0, lt=1 << 31)
    """Server: the round whose result the packet brings, 0 for the start. Site: the round that the packet answers, from 1."""
    base: int | None = Field(default=None, ge=0, lt=1 << 31)
    """Round whose result the packet changes. None: the packet brings all tensors themselves."""
    sender: str = Field(max_length=256)
    codec: str = Field(default="", max_length=32)
    contract: str = Field(default="", max_length=64)
    samples: int = Field(default=0, ge=0, lt=1 << 53)
    """Number of slices that the sender trained on, repetitions included."""
    metrics: dict[Annotated[str, Field(max_length=256)], float | None] = Field(default={}, max_length=256)

    @field_validator("metrics")
    @classmethod
    def _finite(cls, value: dict[str, float | None]) -> dict[str, float | None]:
        """Replace NaN and infinity by None, because the ledger is JSON."""
        return {name: number if number is not None and isfinite(number) else None for name, number in value.items()}


@dataclass(frozen=True)
class Contract:
    """Names and shapes of a packet's tensors, and how they are written. Agreed before the first round."""

    shapes: dict[str, tuple[int, ...]]
    compression: Compression = field(default_factory=Compression)
    """Codec and its options."""
    start: str = ""
    """Checksum of the tensors that every site starts from. They are made from checkpoint and seed, and never sent."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], compression: Compression | None = None) -> "Contract":
        """The contract of a run that starts from these tensors."""
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        return cls(shapes, compression or Compression(), checksum(tensors))

    def part(self, names: Collection[str]) -> "Contract":
        """The contract of a packet that holds only these tensors."""
        return replace(self, shapes={name: shape for name, shape in self.shapes.items() if name in names})

    @property
    def whole(self) -> "Contract":
        """The contract of a packet that holds the tensors themselves, whatever the codec."""
        return replace(self, compression=Compression(codec="fp32"))

    @property
    def hash(self) -> str:
        """SHA-256 of the whole contract."""
        agreed = [list(self.shapes.items()), self.compression.model_dump_json(), self.start]
        return hashlib.sha256(repr(agreed).encode()).hexdigest()

    @property
    def numbers(self) -> int:
        """Number of numbers in all tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors in bytes, as float32."""
        return 4 * self.numbers

    @property
    def coder(self) -> Codec:
        """The codec that ``compression`` names."""
        return codec(self.compression)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the numbers of these tensors, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode(header: Header, contract: Contract, tensors: Mapping[str, Tensor], seed: int = 0) -> bytes:
    """Write tensors as a packet. The same input always produces the same bytes.

    Args:
        header: the packet's header. Its codec and contract are filled in.
        contract: names and shapes of the tensors, and the codec.
        tensors: the tensors, float32.
        seed: seed of the codec's rounding.
    """
    return seal(header, contract, contract.coder.encode(tensors, seed))


def encode_lossy(
    header: Header, contract: Contract, tensors: Mapping[str, Tensor], seed: int
) -> tuple[bytes, dict[str, Tensor]]:
    """Write a packet like ``encode``, and also return the tensors that the receiver will read from it."""
    coder = contract.coder
    entries = coder.encode(tensors, seed)
    # The receiver refuses numbers that are not finite, so nothing is checked here.
    return seal(header, contract, entries), coder.read(entries, contract.shapes)


def seal(header: Header, contract: Contract, entries: Mapping[str, Tensor]) -> bytes:
    """Write arrays as a packet.

    Args:
        header: the packet's header. Its codec and contract are filled in.
        contract: names and shapes of the tensors that the arrays stand for.
        entries: the arrays, by name.
    """
    header = header.model_copy(update={"codec": contract.compression.codec, "contract": contract.hash})
    content = save(dict(entries), metadata={ENTRY: header.model_dump_json()})
    # Packets may be large, so every copy is freed as soon as possible, here and below.
    del entries
    body = zstandard.ZstdCompressor(level=19 if len(content) <= SMALL else 1, write_checksum=True).compress(content)
    del content
    return MAGIC + hashlib.sha256(body).digest() + body


def decode(data: bytes | memoryview, agreed: Callable[[Header], Contract], limit: int) -> tuple[Header, dict[str, Tensor]]:
    """Check a packet and read its header and tensors.

    Args:
        data: the packet.
        agreed: returns the contract that a packet with this header must fulfil, or raises PacketRefused.
        limit: maximum size of the tensors in bytes.

    Returns:
        The header and the tensors, float32.

    Raises:
        PacketRefused: the packet is damaged, too large, or does not fulfil the contract. Nothing in it has been used.
    """
    header, contract, entries = opened(data, agreed, limit)
    try:
        contract.coder.check(entries, contract.shapes)
        tensors = contract.coder.read(entries, contract.shapes)
    except ValueError as error:
        raise PacketRefused(str(error)) from error
    # A finite scale times a finite number can still overflow to infinity.
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PacketRefused(f"its tensor {name} holds NaN or infinity")
    return header, tensors


def opened(
    data: bytes | memoryview, agreed: Callable[[Header], Contract], limit: int
) -> tuple[Header, Contract, dict[str, Tensor]]:
    """Check a packet as a whole, but not yet what its arrays hold. The arguments are those of ``decode``.

    Returns:
        The header, the contract that was agreed, and the arrays.

    Raises:
        PacketRefused: the packet is damaged, too large, or made for another contract.
    """
    prefix = len(MAGIC) + hashlib.sha256().digest_size
    view = memoryview(data)
    body = view[prefix:]
    if view[: len(MAGIC)] != MAGIC:
        if view[: len(NAME)] == NAME:
            raise PacketRefused("its packet format differs; server and sites need the same version of flapsam")
        raise PacketRefused("it is not a flapsam packet")
    if hashlib.sha256(body).digest() != view[len(MAGIC) : prefix]:
        raise PacketRefused("it is damaged: its checksum does not match")
    content = _decompress(body, limit + FRAMING_BYTES)
    try:
        entries = load(content)
        header = Header.model_validate_json(_metadata(content))
        del content
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PacketRefused("it cannot be read") from error
    contract = agreed(header)
    if header.codec != contract.compression.codec:
        raise PacketRefused(f"it uses codec {header.codec!r}, but {contract.compression.codec} was agreed")
    if header.contract != contract.hash:
        raise PacketRefused("it was made for another contract: the shapes, codec options or starting weights differ")
    return header, contract, entries


def _decompress(body: memoryview, limit: int) -> bytes:
    """Decompress ``body``, a single zstandard frame that must declare its size, at most ``limit``, and keep to it."""
    try:
        declared = zstandard.get_frame_parameters(body).content_size
        if declared > limit:
            raise PacketRefused(f"it is too large: at most {limit} bytes are allowed")
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        # BytesIO returns its bytes at the end without copying them.
        content = BytesIO()
        # Piece by piece, because four bytes can become 128 KiB and zstandard trusts the declared size.
        for start in range(0, len(body), PIECE):
            content.write(frame.decompress(body[start : start + PIECE]))
            if content.tell() > declared:
                break
    except (zstandard.ZstdError, MemoryError) as error:
        raise PacketRefused("it cannot be read") from error
    if content.tell() != declared or not frame.eof or frame.unused_data:
        raise PacketRefused("it cannot be read: its size is not the declared one")
    return content.getvalue()


def _metadata(content: bytes) -> str:
    """The header's JSON from the metadata of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    if length > HEADER_BYTES:
        raise ValueError("too long")
    return json.loads(content[8 : 8 + length])["__metadata__"][ENTRY]
