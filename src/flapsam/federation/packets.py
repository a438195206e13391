"""The packet: the only thing that crosses a site's border.

Layout: ``FLAPSAM1``, the SHA-256 (32 bytes) of all that follows, then one zstandard frame. In it lies a safetensors file,
whose metadata holds one entry ``flapsam``: the header as JSON. Nothing in a packet is trusted before it is checked.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

MAGIC = b"FLAPSAM1"
ENTRY = "flapsam"
FRAMING_BYTES = 1 << 20
"""What header and safetensors index may add to the tensors' own bytes."""


class PacketRefused(Exception):  # noqa: N818 (it is a verdict, said in the ledger)
    """A packet is not used; the message is the reason."""


class Header(BaseModel):
    """What a packet says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: str = Field(max_length=64)
    round: int = Field(ge=0, lt=1 << 31)
    """Of a packet from the server: rounds that went into it. Of a site's: the round it answers, from 1."""
    sender: str = Field(max_length=256)
    codec: str = Field(default="fp32", max_length=32)
    contract: str = Field(max_length=64)
    samples: int = Field(default=0, ge=0)
    """Slices that went through the sender's network."""
    metrics: dict[str, float | None] = Field(default={}, max_length=256)


@dataclass(frozen=True)
class Contract:
    """What the tensors of a run's packets are called, and their shapes; all are float32. Agreed before the first round."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Contract":
        """The contract that these tensors fulfil."""
        return cls({name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())})

    @property
    def hash(self) -> str:
        """SHA-256 over names and shapes."""
        return hashlib.sha256(repr(list(self.shapes.items())).encode()).hexdigest()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, uncompressed."""
        return sum(4 * torch.Size(shape).numel() for shape in self.shapes.values())

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise PacketRefused unless names, shapes and dtypes are the contract's and every number is finite."""
        if tensors.keys() != self.shapes.keys():
            odd = sorted(tensors.keys() ^ self.shapes.keys())
            raise PacketRefused(f"tensor names differ from the contract, the first is {odd[0][:80]!r}")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != self.shapes[name] or tensor.dtype != torch.float32:
                raise PacketRefused(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, agreed was {self.shapes[name]}")
            if not torch.isfinite(tensor).all():
                raise PacketRefused(f"{name} holds NaN or infinity")


def encode(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    """A packet of these tensors. The same input gives the same bytes."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    body = zstandard.ZstdCompressor(level=3).compress(save(plain, metadata={ENTRY: header.model_dump_json()}))
    return MAGIC + hashlib.sha256(body).digest() + body


def decode(data: bytes, contract: Contract) -> tuple[Header, dict[str, Tensor]]:
    """Check a packet and open it.

    Raises:
        PacketRefused: it is damaged, too large, or does not fulfil the contract; nothing of it was used.
    """
    prefix = len(MAGIC) + hashlib.sha256().digest_size
    body = data[prefix:]
    if not data.startswith(MAGIC):
        raise PacketRefused("not a flapsam packet")
    if hashlib.sha256(body).digest() != data[len(MAGIC) : prefix]:
        raise PacketRefused("damaged: the checksum differs")
    content = _decompress(body, contract.tensor_bytes + FRAMING_BYTES)
    try:
        tensors = load(content)
        header = Header.model_validate_json(_metadata(content))
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PacketRefused("not readable") from error
    if header.contract != contract.hash:
        raise PacketRefused("made for another contract")
    if header.codec != "fp32":
        raise PacketRefused(f"codec {header.codec!r} is not this run's")
    contract.check(tensors)
    return header, tensors


def _decompress(body: bytes, limit: int) -> bytes:
    """The one zstandard frame in ``body``, which must declare its size, at most ``limit``, and keep to it."""
    try:
        declared = zstandard.get_frame_parameters(body).content_size
        if declared > limit:
            raise PacketRefused(f"too large: {limit} bytes are allowed")
        # A stream, because decompress() believes the declared size and ignores its own limit.
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(body)) as stream:
            content = stream.read(declared + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise PacketRefused("not readable") from error
    if len(content) != declared:
        raise PacketRefused("not readable: its size is not the declared one")
    return content


def _metadata(content: bytes) -> str:
    """The header's JSON from the metadata of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"][ENTRY]
