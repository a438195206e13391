"""Base class of the codecs, which turn tensors of agreed names and shapes into a few arrays, and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Entries = dict[str, Tensor]
"""The arrays of a packet. Each holds all tensors one after another, so names and lengths need not be sent."""


class Codec(ABC):
    """Converts tensors to entries and back. Entries are not trusted: the agreed shapes alone define what they must hold."""

    lossless = False
    """Whether reading restores the same tensors. Values are then sent, otherwise differences from what the receiver has."""

    @abstractmethod
    def encode(self, tensors: Mapping[str, Tensor], seed: int) -> Entries:
        """Write float32 tensors as entries, in the order of their names. ``seed`` is for the rounding."""

    @abstractmethod
    def check(self, entries: Mapping[str, Tensor], shapes: Shapes) -> None:
        """Raise ValueError unless the entries fit these shapes and are finite."""

    @abstractmethod
    def read(self, entries: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Read float32 tensors of these shapes from checked entries. Raises ValueError if a compressed entry is damaged."""


def ordered(shapes: Shapes) -> list[tuple[str, tuple[int, int]]]:
    """Sorted names, each with the rows and columns of its tensor as codecs see it: never more rows than columns."""
    return [(name, _matrix_shape(shapes[name])) for name in sorted(shapes)]


def as_rows(tensor: Tensor) -> Tensor:
    """View a tensor as a matrix, first axis against all others, transposed if it has more rows than columns.

    Each row of a low-rank factor is then one rank, so that one scale per row costs little.
    """
    matrix = tensor.detach().reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.detach().reshape(1, -1)
    return matrix if len(matrix) <= matrix.shape[1] else matrix.T


def from_rows(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo ``as_rows`` for a tensor of this shape."""
    first = shape[0] if len(shape) > 1 else 1
    return (matrix if len(matrix) == first else matrix.T).reshape(shape).contiguous()


def check_entries(entries: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, int | None]]) -> None:
    """Raise ValueError unless the entries have these names, dtypes and lengths (None: any), and are flat and finite."""
    if entries.keys() != expected.keys():
        odd = sorted(entries.keys() ^ expected.keys())
        raise ValueError(f"its entries are not those of its codec: {odd[0][:80]!r} is missing or unexpected")
    for name, (dtype, length) in expected.items():
        entry = entries[name]
        if entry.dtype != dtype or entry.ndim != 1 or length not in (None, len(entry)):
            size = "any length" if length is None else f"length {length}"
            shape = tuple(entry.shape)
            raise ValueError(f"its entry {name!r} is {entry.dtype} of shape {shape}, but {dtype} of {size} was agreed")
        if dtype.is_floating_point and not torch.isfinite(entry).all():
            raise ValueError(f"its entry {name!r} holds NaN or infinity")


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (1, torch.Size(shape).numel())
    return min(rows, columns), max(rows, columns)
