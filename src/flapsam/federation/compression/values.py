"""Ways of writing numbers: as floats, or as small integers with one scale per row."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flapsam.federation.compression.codec import Codec, Entries, Shapes, as_rows, check_entries, from_rows, ordered

Expected = dict[str, tuple[torch.dtype, int | None]]

STEPS = (0.5, 16.0)
"""Range of the step, in root mean squares. The smallest takes 3 bits per number of a normal distribution."""
SAMPLE = 1 << 20
"""About how many numbers are sampled to choose the step."""


class Values(ABC):
    """A way of writing numbers that come in rows. Rows may lack some of their numbers."""

    lossless = False

    @abstractmethod
    def write(self, values: Tensor, lengths: Tensor, seed: int) -> Entries:
        """Write flat float32 ``values``, row after row, as entries. ``lengths`` holds the number of values in each row."""

    @abstractmethod
    def expected(self, count: int, row_count: int) -> Expected:
        """Dtype and length of each entry for ``count`` values in ``row_count`` rows."""

    @abstractmethod
    def read(self, entries: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
        """Read the values from checked entries. Raises ValueError if a compressed entry is damaged."""


class Floats(Values):
    """Floats of one dtype. float32 is exact, and bfloat16 keeps 8 bits: |error| ≤ 2⁻⁸ |x|."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.lossless = dtype == torch.float32

    def write(self, values: Tensor, lengths: Tensor, seed: int) -> Entries:
        return {"values": values.to(self.dtype)}

    def expected(self, count: int, row_count: int) -> Expected:
        return {"values": (self.dtype, count)}

    def read(self, entries: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
        return entries["values"].float()


class Integers(Values):
    """Integers of 8 or 4 bits times one scale per row, rounded up or down at random so that the mean is right.

    Stochastic rounding as in QSGD (Alistarh et al. 2017, arXiv 1610.02132), with the row's largest magnitude at the largest
    integer. The error has mean 0 and is below one step, which is 1.01 · max |row| / 127 or / 7. Scales are bfloat16.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.largest = 2 ** (bits - 1) - 1

    def write(self, values: Tensor, lengths: Tensor, seed: int) -> Entries:
        peaks = _by_row("max", values.abs(), lengths)
        # The margin keeps rounded scales from falling below the exact ones, so no value exceeds the largest integer.
        scales = (peaks * (1 + 2**-8) / self.largest).bfloat16()
        draw = torch.rand(len(values), generator=torch.Generator().manual_seed(seed))
        return self._entries(torch.floor(values / _divisors(scales, lengths) + draw), scales)

    def expected(self, count: int, row_count: int) -> Expected:
        packed = (torch.int8, count) if self.bits == 8 else (torch.uint8, (count + 1) // 2)
        return {"values": packed, "scales": (torch.bfloat16, row_count)}

    def read(self, entries: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
        scales = torch.repeat_interleave(entries["scales"].float(), lengths)
        return self._unpack(entries["values"], len(scales)).float() * scales

    def _entries(self, whole: Tensor, scales: Tensor) -> Entries:
        # Values that are not finite show in the scales, which the receiver checks.
        whole = whole.nan_to_num().clamp(-self.largest, self.largest).to(torch.int8)
        return {"values": self._pack(whole), "scales": scales}

    def _pack(self, whole: Tensor) -> Tensor:
        """Pack 4-bit values two to a byte, each with 8 added. 8-bit values stay as they are."""
        if self.bits == 8:
            return whole
        pairs = torch.full((len(whole) + len(whole) % 2,), 8, dtype=torch.uint8)
        pairs[: len(whole)] = (whole + 8).to(torch.uint8)
        return pairs[0::2] | (pairs[1::2] << 4)

    def _unpack(self, packed: Tensor, count: int) -> Tensor:
        if self.bits == 8:
            return packed
        return (torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count].to(torch.int8)) - 8


class Steps(Integers):
    """Whole multiples of a step, at most 7 in either direction. The step makes a number take ``bits`` on average.

    A step is a multiple of the root mean square of its row, the same multiple for all rows. Numbers are rounded to the
    nearest step. The scale sent for a row is not the step but the factor with the least error, because numbers are denser
    towards zero. A row's error is below its own norm, and below that of half a step for every number, except beyond 7.5
    steps. A Huffman code exploits that most steps are rare. For numbers from a normal distribution this comes within a third
    of a bit of what is possible (Gish & Pierce 1968), whereas sending only the largest numbers loses several times as much
    at the same rate. Meant for differences with feedback.
    """

    def __init__(self, bits: float) -> None:
        super().__init__(4)
        self.target = bits

    def expected(self, count: int, row_count: int) -> Expected:
        return {**super().expected(count, row_count), "values": (torch.uint8, None)}

    def write(self, values: Tensor, lengths: Tensor, seed: int) -> Entries:
        spread = (_row_sums(values**2, lengths) / lengths.clamp(min=1)).sqrt().float()
        relative = values / _divisors(spread, lengths)
        whole = torch.round(relative / self._step(relative)).clamp(-self.largest, self.largest)
        # The scale s with the least Σ (x − s·q)² is s = Σ x·q / Σ q².
        scales = _row_sums(values * whole, lengths) / _row_sums(whole**2, lengths).clamp(min=1)
        return self._entries(whole, scales.bfloat16())

    def _pack(self, whole: Tensor) -> Tensor:
        # zstandard looks for repetitions, finds only chance ones, and needs a tenth more bytes than a Huffman code alone.
        deflate = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
        packed = deflate.compress(super()._pack(whole).numpy().tobytes()) + deflate.flush()
        return _bytes(packed)

    def _unpack(self, packed: Tensor, count: int) -> Tensor:
        size = (count + 1) // 2
        inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            plain = inflate.decompress(packed.numpy().tobytes(), max_length=size + 1)
        except zlib.error as error:
            raise ValueError("its entry 'values' cannot be decompressed") from error
        if len(plain) != size or not inflate.eof or inflate.unused_data:
            raise ValueError(f"its entry 'values' does not hold the {count} numbers agreed")
        return super()._unpack(_bytes(plain), count)

    def _step(self, values: Tensor) -> float:
        """The smallest step at which these numbers have an entropy of at most ``bits``, to within a thousandth."""
        sample = values[:: len(values) // SAMPLE + 1].nan_to_num()
        low, high = STEPS
        while high / low > 1.001:
            middle = (low * high) ** 0.5
            whole = torch.round(sample / middle).clamp(-self.largest, self.largest).long() + self.largest
            share = torch.bincount(whole).double() / max(len(whole), 1)
            if float(torch.special.entr(share).sum()) / math.log(2) > self.target:
                low = middle
            else:
                high = middle
        return high


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def _row_sums(values: Tensor, lengths: Tensor) -> Tensor:
    return _by_row("sum", values.double(), lengths)


def _by_row(reduction: str, values: Tensor, lengths: Tensor) -> Tensor:
    # segment_reduce fails if there are no rows.
    return torch.segment_reduce(values, reduction, lengths=lengths, initial=0.0) if len(lengths) else values.new_zeros(0)


def _divisors(scales: Tensor, lengths: Tensor) -> Tensor:
    """The scale of every number, or 1 where the scale is 0, because all numbers of that row are 0."""
    steps = scales.float()
    return torch.repeat_interleave(steps.where(steps != 0, 1.0), lengths)


class Dense(Codec):
    """Sends all numbers, written in one way."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.lossless = values.lossless

    def encode(self, tensors: Mapping[str, Tensor], seed: int) -> Entries:
        matrices = [as_rows(tensors[name]) for name in sorted(tensors)]
        return self.values.write(flattened(matrices), row_lengths([matrix.shape for matrix in matrices]), seed)

    def check(self, entries: Mapping[str, Tensor], shapes: Shapes) -> None:
        sizes = [size for _, size in ordered(shapes)]
        count = sum(rows * columns for rows, columns in sizes)
        check_entries(entries, self.values.expected(count, sum(rows for rows, _ in sizes)))

    def read(self, entries: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        return split(self.values.read(entries, row_lengths([size for _, size in ordered(shapes)])), shapes)


def flattened(matrices: Sequence[Tensor]) -> Tensor:
    """All numbers of the matrices as one vector."""
    return torch.cat([torch.zeros(0), *(matrix.reshape(-1) for matrix in matrices)])


def row_lengths(sizes: Sequence[Sequence[int]]) -> Tensor:
    """Lengths of all rows of matrices of these sizes, one matrix after another."""
    return torch.tensor([columns for rows, columns in sizes for _ in range(rows)], dtype=torch.long)


def split(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Split one vector into tensors of these shapes."""
    tensors, start = {}, 0
    for name, (rows, columns) in ordered(shapes):
        matrix = flat[start : start + rows * columns].reshape(rows, columns)
        tensors[name] = from_rows(matrix, shapes[name])
        start += rows * columns
    return tensors
