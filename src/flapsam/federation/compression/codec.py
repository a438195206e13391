"""What every codec is: it turns tensors whose names and shapes are agreed into a few arrays, and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Entries = dict[str, Tensor]
"""What goes into a packet: all tensors one after another, so names and lengths need not be sent."""


class Codec(ABC):
    """Tensors ↔ entries. Nothing in entries is believed: what they must hold follows from the agreed shapes alone."""

    lossless = False
    """Whether decoding gives the same tensors; then values are sent, otherwise differences to what the receiver has."""

    @abstractmethod
    def encode(self, tensors: Mapping[str, Tensor], seed: int) -> Entries:
        """The entries of float32 tensors, in the order of their names; ``seed`` is of the rounding."""

    @abstractmethod
    def check(self, entries: Mapping[str, Tensor], shapes: Shapes) -> None:
        """Raise ValueError unless the entries are what these shapes ask for, and finite."""

    @abstractmethod
    def read(self, entries: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """The float32 tensors of these shapes from checked entries; raises ValueError if a compressed one is damaged."""


def ordered(shapes: Shapes) -> list[tuple[str, tuple[int, int]]]:
    """Names in order, each with its tensor's rows and columns as codecs see it: never more rows than columns."""
    return [(name, _matrix_shape(shapes[name])) for name in sorted(shapes)]


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix with the first axis against all others, turned so that it has no more rows than columns.

    A row of either low-rank factor is then one rank, and scales by row cost little.
    """
    matrix = tensor.detach().reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.detach().reshape(1, -1)
    return matrix if len(matrix) <= matrix.shape[1] else matrix.T


def from_rows(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this shape that ``as_rows`` made a matrix of."""
    first = shape[0] if len(shape) > 1 else 1
    return (matrix if len(matrix) == first else matrix.T).reshape(shape).contiguous()


def check_entries(entries: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, int | None]]) -> None:
    """Raise ValueError unless the entries have these names, each flat, of this dtype and length (None: any) and finite."""
    if entries.keys() != expected.keys():
        odd = sorted(entries.keys() ^ expected.keys())
        raise ValueError(f"entries differ from the codec's, the first is {odd[0][:80]!r}")
    for name, (dtype, length) in expected.items():
        entry = entries[name]
        if entry.dtype != dtype or entry.ndim != 1 or length not in (None, len(entry)):
            raise ValueError(f"entry {name} is {entry.dtype} {tuple(entry.shape)}, agreed was {dtype} ({length},)")
        if dtype.is_floating_point and not torch.isfinite(entry).all():
            raise ValueError(f"entry {name} holds NaN or infinity")


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (1, torch.Size(shape).numel())
    return min(rows, columns), max(rows, columns)
