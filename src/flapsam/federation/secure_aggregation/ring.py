"""Changes as whole numbers modulo a power of two, so that sums are exact and masks can be added to them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, log2

import numpy as np
import torch
from torch import Tensor

from flapsam.federation.compression.codec import Shapes, as_rows, ordered
from flapsam.federation.compression.values import flattened, split

LEAST_LEVELS = 8
"""Number of steps from 0 to the end of the range that the site with the smallest share has at least."""
LEAST_BITS, MOST_BITS = 8, 24
"""Range of the number of bits."""
LEAST_RANGE, MOST_RANGE = 1e-20, 1e20
"""Ranges that a tensor's change may have."""
BLOCK = 1 << 16
"""How many numbers are packed at a time."""


@dataclass(frozen=True)
class Ring:
    """The whole numbers modulo 2 to the power of ``bits``. Each number of a change becomes one of them.

    All sites use the same range for a tensor, from −R to R. A site's whole number is its change times its share times
    (2^(bits−1) − 1) / R, rounded up or down at random so that the mean is right. Shares add up to at most 1, so the sum over
    the sites never leaves the range of the ring, and it is the weighted sum.
    """

    bits: int

    @classmethod
    def of(cls, shares: Iterable[float]) -> "Ring":
        """The smallest ring in which every site has enough levels.

        Args:
            shares: the sites' shares in the mean, above 0.

        Raises:
            ValueError: the smallest share needs more bits than there are.
        """
        bits = max(ceil(log2(2 * (LEAST_LEVELS / min(shares) + 1))), LEAST_BITS)
        if bits > MOST_BITS:
            raise ValueError("a share is too small")
        return cls(bits)

    @property
    def largest(self) -> int:
        """The largest whole number of a sum."""
        return 2 ** (self.bits - 1) - 1

    def whole(
        self, change: Mapping[str, Tensor], ranges: Mapping[str, float], share: float, seed: int
    ) -> tuple[np.ndarray, list[str]]:
        """Turn a site's change into whole numbers.

        Args:
            change: the tensors, float32 and finite.
            ranges: name of a tensor → its range R, above 0.
            share: the site's share in the mean, above 0.
            seed: seed of the rounding.

        Returns:
            The whole numbers of all tensors, in the order of their names (int32), and the names of the tensors whose change
            was beyond its range. Such a change is scaled down as a whole. If single numbers were cut, a tiny range would
            tell their signs.
        """
        most = int(share * self.largest)
        shapes = {name: tuple(tensor.shape) for name, tensor in change.items()}
        peaks = {name: float(tensor.abs().max()) * share * self.largest for name, tensor in change.items()}
        beyond = [name for name, peak in peaks.items() if peak > most * ranges[name]]
        reached = {name: peaks[name] / most if name in beyond else ranges[name] for name in change}
        values = flattened([as_rows(change[name]) for name in sorted(change)]).double()
        factors = _spread(reached, shapes).reciprocal() * (share * self.largest)
        draw = torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        # Rounding at random may take a number at the end of the range one step beyond it.
        rounded = torch.floor(values * factors + draw).clamp(-most, most)
        return rounded.numpy().astype(np.int32), beyond

    def mean(self, total: np.ndarray, shapes: Shapes, ranges: Mapping[str, float], share: float) -> dict[str, Tensor]:
        """The weighted mean of the sites' changes, from the sum of their whole numbers.

        Args:
            total: the sum, modulo the ring's size.
            shapes: the tensors' shapes.
            ranges: name of a tensor → its range R.
            share: the sum of the shares of the sites in the sum.
        """
        signed = total.astype(np.int64)
        signed[signed > self.largest] -= 1 << self.bits
        values = torch.from_numpy(signed).double() * _spread(ranges, shapes) / (share * self.largest)
        return split(values.float(), shapes)

    def reduced(self, numbers: np.ndarray) -> np.ndarray:
        """Whole numbers modulo the ring's size, as uint32."""
        return numbers.astype(np.uint32) & np.uint32((1 << self.bits) - 1)

    def size(self, count: int) -> int:
        """Number of bytes of so many packed numbers."""
        return (count * self.bits + 7) // 8

    def packed(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of the ring, ``bits`` bits each, as bytes."""
        parts = []
        for start in range(0, len(numbers), BLOCK):
            block = numbers[start : start + BLOCK].astype(">u4").view(np.uint8).reshape(-1, 4)
            parts.append(np.packbits(np.unpackbits(block, axis=1)[:, 32 - self.bits :].reshape(-1)))
        return np.concatenate([np.zeros(0, np.uint8), *parts])

    def unpacked(self, data: np.ndarray, count: int) -> np.ndarray:
        """Undo ``packed`` for so many numbers."""
        parts = [np.zeros(0, np.uint32)]
        for start in range(0, count, BLOCK):
            length = min(BLOCK, count - start)
            piece = data[start * self.bits // 8 :][: self.size(length)]
            bits = np.unpackbits(piece)[: length * self.bits].reshape(length, self.bits)
            wide = np.zeros((length, 32), np.uint8)
            wide[:, 32 - self.bits :] = bits
            parts.append(np.packbits(wide, axis=1).view(">u4").reshape(-1).astype(np.uint32))
        return np.concatenate(parts)


def _spread(ranges: Mapping[str, float], shapes: Shapes) -> Tensor:
    """The range of every number, in the order in which numbers are written, float64."""
    sizes = ordered(shapes)
    lengths = torch.tensor([rows * columns for _, (rows, columns) in sizes])
    return torch.repeat_interleave(torch.tensor([ranges[name] for name, _ in sizes], dtype=torch.float64), lengths)
