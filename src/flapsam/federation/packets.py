"""The packet: the only thing that crosses a site's border.

Layout: ``FLAPSAM2``, whose digit is the packet's format, the SHA-256 (32 bytes) of all that follows, then one zstandard
frame. In it lies a safetensors file with a codec's entries, whose metadata holds one entry ``flapsam``: the header as JSON.
Nothing in a packet is trusted before it is checked.
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
"""Content up to so many bytes is compressed at zstandard's level 19, which saves some hundredths; more at level 1."""
PIECE = 1 << 12
"""Bytes that are decompressed at a time."""
HEADER_BYTES = 1 << 16
"""That header and safetensors index may take."""
FRAMING_BYTES = 1 << 20
"""What is not the tensors' own bytes: the header, and a codec's scales and gaps."""


class PacketRefused(Exception):  # noqa: N818 (it is a verdict, said in the ledger)
    """A packet is not used; the message is the reason."""


class Header(BaseModel):
    """What a packet says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: str = Field(max_length=64)
    round: int = Field(ge=0, lt=1 << 31)
    """Of a packet from the server: rounds that went into it. Of a site's: the round it answers, from 1."""
    base: int | None = Field(default=None, ge=0, lt=1 << 31)
    """Rounds that went into the tensors that these change; None: these are all of them."""
    sender: str = Field(max_length=256)
    codec: str = Field(default="", max_length=32)
    contract: str = Field(default="", max_length=64)
    samples: int = Field(default=0, ge=0, lt=1 << 53)
    """Slices that went through the sender's network."""
    metrics: dict[Annotated[str, Field(max_length=256)], float | None] = Field(default={}, max_length=256)

    @field_validator("metrics")
    @classmethod
    def _finite(cls, value: dict[str, float | None]) -> dict[str, float | None]:
        """What is no number is left open: the ledger is JSON."""
        return {name: one if one is not None and isfinite(one) else None for name, one in value.items()}


@dataclass(frozen=True)
class Contract:
    """What a packet's tensors are called, their shapes, and how they are written. Agreed before the first round."""

    shapes: dict[str, tuple[int, ...]]
    compression: Compression = field(default_factory=Compression)
    """With which options."""
    start: str = ""
    """Checksum of the tensors that every site begins with; they are made from checkpoint and seed, and never sent."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], compression: Compression | None = None) -> "Contract":
        """The contract of a run that begins with these tensors."""
        digest = hashlib.sha256()
        for _, tensor in sorted(tensors.items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        return cls(shapes, compression or Compression(), digest.hexdigest())

    def part(self, names: Collection[str]) -> "Contract":
        """The contract of a packet with only these tensors."""
        return replace(self, shapes={name: shape for name, shape in self.shapes.items() if name in names})

    @property
    def whole(self) -> "Contract":
        """The contract of a packet with the tensors themselves, whatever the codec."""
        return replace(self, compression=Compression(codec="fp32"))

    @property
    def hash(self) -> str:
        """SHA-256 over all of it."""
        agreed = [list(self.shapes.items()), self.compression.model_dump_json(), self.start]
        return hashlib.sha256(repr(agreed).encode()).hexdigest()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as float32."""
        return sum(4 * torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def coder(self) -> Codec:
        """The codec itself."""
        return codec(self.compression)


def encode(header: Header, contract: Contract, tensors: Mapping[str, Tensor], seed: int = 0) -> bytes:
    """A packet of these tensors. The same input gives the same bytes.

    Args:
        header: what it says about itself; codec and contract are filled in.
        contract: whose tensors these are.
        tensors: float32.
        seed: of the codec's rounding.
    """
    return _seal(header, contract, contract.coder.encode(tensors, seed))


def encode_lossy(
    header: Header, contract: Contract, tensors: Mapping[str, Tensor], seed: int
) -> tuple[bytes, dict[str, Tensor]]:
    """As ``encode``; also the tensors that the receiver will find in it."""
    coder = contract.coder
    entries = coder.encode(tensors, seed)
    # Numbers that are not finite are for the receiver to refuse, so nothing is checked here.
    return _seal(header, contract, entries), coder.read(entries, contract.shapes)


def _seal(header: Header, contract: Contract, entries: Mapping[str, Tensor]) -> bytes:
    header = header.model_copy(update={"codec": contract.compression.codec, "contract": contract.hash})
    content = save(dict(entries), metadata={ENTRY: header.model_dump_json()})
    # A packet may be large, so nothing is held longer than it is needed, here and below.
    del entries
    body = zstandard.ZstdCompressor(level=19 if len(content) <= SMALL else 1, write_checksum=True).compress(content)
    del content
    return MAGIC + hashlib.sha256(body).digest() + body


def decode(data: bytes | memoryview, agreed: Callable[[Header], Contract], limit: int) -> tuple[Header, dict[str, Tensor]]:
    """Check a packet and open it.

    Args:
        data: the packet.
        agreed: gives the contract that a packet with this header must fulfil, or refuses it.
        limit: bytes that its tensors may take.

    Raises:
        PacketRefused: it is damaged, too large, or does not fulfil the contract; nothing of it was used.
    """
    prefix = len(MAGIC) + hashlib.sha256().digest_size
    view = memoryview(data)
    body = view[prefix:]
    if view[: len(MAGIC)] != MAGIC:
        if view[: len(NAME)] == NAME:
            raise PacketRefused("a packet of another format: server and sites need the same version of flapsam")
        raise PacketRefused("not a flapsam packet")
    if hashlib.sha256(body).digest() != view[len(MAGIC) : prefix]:
        raise PacketRefused("damaged: the checksum differs")
    content = _decompress(body, limit + FRAMING_BYTES)
    try:
        entries = load(content)
        header = Header.model_validate_json(_metadata(content))
        del content
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PacketRefused("not readable") from error
    contract = agreed(header)
    if header.codec != contract.compression.codec:
        raise PacketRefused(f"codec {header.codec!r} is not the one agreed, which is {contract.compression.codec}")
    if header.contract != contract.hash:
        raise PacketRefused("made for another contract")
    try:
        contract.coder.check(entries, contract.shapes)
        tensors = contract.coder.read(entries, contract.shapes)
    except ValueError as error:
        raise PacketRefused(str(error)) from error
    # Scales of finite numbers can still multiply to infinity.
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PacketRefused(f"{name} holds NaN or infinity")
    return header, tensors


def _decompress(body: memoryview, limit: int) -> bytes:
    """The one zstandard frame that ``body`` is, which must declare its size, at most ``limit``, and keep to it."""
    try:
        declared = zstandard.get_frame_parameters(body).content_size
        if declared > limit:
            raise PacketRefused(f"too large: {limit} bytes are allowed")
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        # It gives its bytes away at the end without copying them.
        content = BytesIO()
        # Piece by piece: four bytes can become 128 KiB, and zstandard believes the declared size.
        for start in range(0, len(body), PIECE):
            content.write(frame.decompress(body[start : start + PIECE]))
            if content.tell() > declared:
                break
    except (zstandard.ZstdError, MemoryError) as error:
        raise PacketRefused("not readable") from error
    if content.tell() != declared or not frame.eof or frame.unused_data:
        raise PacketRefused("not readable: its size is not the declared one")
    return content.getvalue()


def _metadata(content: bytes) -> str:
    """The header's JSON from the metadata of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    if length > HEADER_BYTES:
        raise ValueError("too long")
    return json.loads(content[8 : 8 + length])["__metadata__"][ENTRY]
