"""The mean of every number without the clients that give the most and the least."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flapsam.federation.aggregation.aggregator import Reply
from flapsam.federation.aggregation.fedavg import FedAvg

SHARE = 0.2
"""Of the clients, rounded down, that are dropped at either end."""
VALUES = 2**20
"""Numbers of all clients together that are in memory at a time (4 MiB), or one row of each if that is more."""


class TrimmedMean(FedAvg):
    """Of every number, factors too, the mean without the fifth of clients that give the least and the fifth that give the
    most (coordinate-wise trimmed mean, Yin et al. 2018, arXiv 1803.01498).

    Clients of a weight above 0 count equally, or a weight could outvote the rest. Up to a fifth of them may send anything
    and move no number beyond what the others sent. Not the mean of the products B·A. Traffic as with ``fedavg``.
    """

    def dropped(self, count: int) -> int:
        """How many of so many clients are dropped at either end."""
        return int(SHARE * count)

    def average(self, name: str, replies: Sequence[Reply], previous: Mapping[str, Tensor]) -> Tensor:
        """The trimmed mean of one tensor over those who sent it, a few rows at a time."""
        senders = [reply for reply in replies if name in reply.names]
        if not senders:
            return previous[name]
        result = torch.empty_like(previous[name])
        step = max(VALUES // (len(senders) * result[0].numel()), 1)
        drop = self.dropped(len(senders))
        for first in range(0, len(result), step):
            rows = slice(first, first + step)
            values = np.zeros((len(senders), *result[rows].shape), np.float32)
            for reply, place in zip(senders, values, strict=True):
                part = reply.read(name, rows).numpy()
                # Of a smaller rank, the rows and columns that are missing count as zeros.
                place[tuple(slice(length) for length in part.shape)] = part
            # NumPy sorts in place, and twenty times as fast as torch does along this axis.
            values.sort(axis=0)
            result[rows] = torch.from_numpy(values[drop : len(senders) - drop].mean(axis=0, dtype=np.float64))
        return result
