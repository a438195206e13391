"""Base class of the aggregators, which read clients' tensors one at a time and return the global ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"
ALL = slice(None)


@dataclass(frozen=True)
class Reply:
    """A client's answer to a round, as tensors. They need not be in memory."""

    weight: float
    names: Collection[str]
    read: Callable[[str, slice], Tensor]
    """Reads a slice of rows from the tensor of this name."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], weight: float) -> "Reply":
        """A reply whose tensors are in memory."""
        return cls(weight, tensors.keys(), lambda name, rows: tensors[name][rows])


class Aggregator(ABC):
    """Averages clients' tensors. A subclass defines what that means for low-rank factors.

    Tensors are read layer by layer and client by client, so memory does not grow with the number of clients. Weights need
    not sum to one, because they are normalised over the clients that answered. A client may have a smaller rank than the
    run.
    """

    keeps_basis = True
    """Whether factors keep their basis from round to round, so that their differences between rounds are meaningful."""
    base_weights = False
    """Whether the adapted layers' own weights change, too. If so, they are among the global tensors and travel down."""

    sums = False
    """Whether the result depends on the weighted sum of the clients' tensors alone, so that no client's own are needed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def up(self, name: str, number: int) -> bool:
        """Whether clients train and send a tensor in round ``number``, from 1. Otherwise the tensor stays as it is.

        Called only for tensors that clients can train.
        """
        return True

    def down(self, name: str, number: int) -> bool:
        """Whether round ``number`` changes a tensor, which then travels down.

        Called for all global tensors, including base weights, which clients may not train.
        """
        return self.up(name, number)

    def bears(self, count: int) -> int | None:
        """Number of clients that may send anything without moving a number beyond the range of what the others sent.

        Args:
            count: number of clients with a weight above 0.

        Returns:
            That number, or None if the aggregator is not made to bear any.
        """
        return None

    def aggregate(self, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Aggregate the replies of a round.

        A tensor that no reply holds stays as it is, unless ``factors`` changes it.

        Args:
            replies: the clients' replies, in the order of the sites' names.
            previous: the global tensors that the clients started from. They define names and shapes.
            number: number of the round, from 1.

        Returns:
            The new global tensors, float32 and contiguous, under the same names.

        Raises:
            ValueError: no client has a weight above 0.
        """
        replies = [reply for reply in replies if reply.weight > 0]
        if not replies:
            raise ValueError("no client had a weight above 0")
        # A factor whose other one stays with the clients is averaged like any tensor (FedSA-LoRA, arXiv 2410.01463).
        layers = [layer for layer in lora_layers(previous) if layer + B in previous]
        factors = {layer + part for layer in layers for part in (A, B)}
        result = dict(previous)
        for name in previous:
            if name not in factors:
                result[name] = self.average(name, replies, previous)
        for layer in layers:
            changed = self.factors(layer, replies, previous, number)
            result |= {name: tensor.contiguous() for name, tensor in changed.items()}
        return result

    @abstractmethod
    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        """The new tensors of a layer by name: its factors B (out, rank) and A (rank, in), and possibly its own weight."""

    def average(self, name: str, replies: Sequence[Reply], previous: Mapping[str, Tensor]) -> Tensor:
        """Σ w·θ / Σ w of one tensor over the clients that sent it (FedAvg, McMahan et al. 2017, arXiv 1602.05629)."""
        senders = [reply for reply in replies if name in reply.names]
        if not senders:
            return previous[name]
        total = torch.zeros(previous[name].shape, dtype=torch.float64)
        for reply in senders:
            # In float64, so that the mean of equal tensors is exactly that tensor.
            part = reply.read(name, ALL).double()
            # Rows and columns that a smaller rank lacks count as zeros (HetLoRA, arXiv 2401.06432).
            total[tuple(slice(length) for length in part.shape)] += part * reply.weight
        return (total / sum(reply.weight for reply in senders)).float()


def mean_product(layer: str, replies: Sequence[Reply]) -> Tensor:
    """Σ w·B·A / Σ w of a layer, float64 (out, in)."""
    total: Tensor | None = None
    for reply in replies:
        outward, inward = reply.read(layer + B, ALL).double() * reply.weight, reply.read(layer + A, ALL).double()
        total = outward @ inward if total is None else total.addmm_(outward, inward)
    if total is None:
        raise ValueError("no client had a weight above 0")
    return total.div_(sum(reply.weight for reply in replies))


def lora_layers(names: Iterable[str]) -> list[str]:
    """Names of the layers with low-rank factors, sorted."""
    return sorted(name.removesuffix(A) for name in names if name.endswith(A))
