"""Only the largest numbers of every tensor, and the gaps between them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flapsam.federation.compression.codec import Codec, Entries, Shapes, as_rows, check_entries, ordered
from flapsam.federation.compression.values import Values, flattened, row_lengths, split

SKIP = 255
"""Byte in a gap that stands for 255 places without a number."""


class TopK(Codec):
    """Sends the fraction ``density`` of each tensor with the largest magnitudes. The rest is zero.

    Aji & Heafield 2017 (arXiv 1704.05021) send gradients this way. No number that is left out is larger in magnitude than
    one that is kept. Places are sent as gaps of one byte: the places skipped since the last number, where 255 stands for 255
    skipped places and no number.
    """

    def __init__(self, values: Values, density: float) -> None:
        self.values = values
        self.density = density

    def kept(self, count: int) -> int:
        """How many of a tensor's ``count`` numbers are sent, at least one."""
        return min(count, max(1, math.ceil(self.density * count)))

    def encode(self, tensors: Mapping[str, Tensor], seed: int) -> Entries:
        places, start = [torch.zeros(0, dtype=torch.long)], 0
        matrices = [as_rows(tensors[name]) for name in sorted(tensors)]
        for matrix in matrices:
            # A stable sort breaks ties the same way on every machine.
            order = torch.sort(matrix.reshape(-1).abs(), descending=True, stable=True).indices
            places.append(start + order[: self.kept(matrix.numel())].sort().values)
            start += matrix.numel()
        kept, flat = torch.cat(places), flattened(matrices)
        written = self.values.write(flat[kept], _kept_lengths(kept, [matrix.shape for matrix in matrices]), seed)
        return {"gaps": to_gaps(kept), **written}

    def check(self, entries: Mapping[str, Tensor], shapes: Shapes) -> None:
        sizes = [size for _, size in ordered(shapes)]
        kept = sum(self.kept(rows * columns) for rows, columns in sizes)
        expected = self.values.expected(kept, sum(rows for rows, _ in sizes))
        check_entries(entries, {"gaps": (torch.uint8, None), **expected})
        check_gaps(entries["gaps"], kept, sum(rows * columns for rows, columns in sizes))

    def read(self, entries: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        sizes = [size for _, size in ordered(shapes)]
        places = from_gaps(entries["gaps"])
        flat = torch.zeros(sum(rows * columns for rows, columns in sizes))
        flat[places] = self.values.read(entries, _kept_lengths(places, sizes))
        return split(flat, shapes)


def _kept_lengths(places: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """How many of these ascending places lie in each row."""
    ends = row_lengths(sizes).cumsum(0)
    return torch.diff(torch.searchsorted(places, ends), prepend=torch.tensor([0]))


def to_gaps(places: Tensor) -> Tensor:
    """Write ascending places as gaps of one byte each, with an extra byte 255 for every 255 places skipped."""
    gaps = torch.diff(places, prepend=torch.tensor([-1])) - 1
    skips = gaps // SKIP
    result = torch.full((len(gaps) + int(skips.sum()),), SKIP, dtype=torch.uint8)
    result[torch.arange(len(gaps)) + skips.cumsum(0)] = (gaps % SKIP).to(torch.uint8)
    return result


def from_gaps(gaps: Tensor) -> Tensor:
    """Read the places back from gaps."""
    numbers = gaps != SKIP
    # Every number takes up one place after its gap.
    return (gaps.long() + numbers.long()).cumsum(0)[numbers] - 1


def check_gaps(gaps: Tensor, count: int, end: int) -> None:
    """Raise ValueError unless the gaps lead to exactly ``count`` places, all below ``end``."""
    if len(gaps) > count + end // SKIP or int((gaps != SKIP).sum()) != count:
        raise ValueError(f"its entry 'gaps' does not hold the {count} places agreed")
    if count and (gaps[-1] == SKIP or int(from_gaps(gaps)[-1]) >= end):
        raise ValueError("its entry 'gaps' leads beyond the last place")
