"""The mean of every number without the clients' largest and smallest values."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flapsam.federation.aggregation.aggregator import Reply
from flapsam.federation.aggregation.fedavg import FedAvg

SHARE = 0.2
"""Fraction of the clients that are dropped at either end, rounded down to whole clients."""
VALUES = 2**20
"""How many numbers of all clients together are in memory at a time (4 MiB), or one row of each client if that is more."""


class TrimmedMean(FedAvg):
    """Takes the mean of every number, factors included, without the smallest fifth and the largest fifth of the clients'
    values (coordinate-wise trimmed mean, Yin et al. 2018, arXiv 1803.01498).

    All clients with a weight above 0 count equally, because otherwise one large weight could outvote the rest. Up to a fifth
    of the clients may send arbitrary values and still move no number beyond the range of what the others sent. Not the mean
    of the products B·A. Traffic as with ``fedavg``.
    """

    sums = False

    def dropped(self, count: int) -> int:
        """Number of clients dropped at either end, out of ``count``."""
        return int(SHARE * count)

    def bears(self, count: int) -> int:
        """As many as are dropped at either end: a false value is among these, or lies between two honest ones.

        The clients' weights have no part in it, so a client cannot claim a larger say.
        """
        return self.dropped(count)

    def average(self, name: str, replies: Sequence[Reply], previous: Mapping[str, Tensor]) -> Tensor:
        """The trimmed mean of one tensor over the clients that sent it, a few rows at a time."""
        senders = [reply for reply in replies if name in reply.names]
        if not senders:
            return previous[name]
        result = torch.empty_like(previous[name])
        step = max(VALUES // (len(senders) * result[0].numel()), 1)
        drop = self.dropped(len(senders))
        for first in range(0, len(result), step):
            rows = slice(first, first + step)
            values = np.zeros((len(senders), *result[rows].shape), np.float32)
            for reply, target in zip(senders, values, strict=True):
                part = reply.read(name, rows).numpy()
                # Rows and columns that a smaller rank lacks count as zeros.
                target[tuple(slice(length) for length in part.shape)] = part
            # NumPy sorts in place, and along this axis twenty times as fast as torch.
            values.sort(axis=0)
            result[rows] = torch.from_numpy(values[drop : len(senders) - drop].mean(axis=0, dtype=np.float64))
        return result
