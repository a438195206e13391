"""What every aggregator is: it reads clients' tensors one at a time and gives the global ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"
ALL = slice(None)


@dataclass(frozen=True)
class Reply:
    """One client's tensors, which need not be in memory."""

    weight: float
    names: Collection[str]
    read: Callable[[str, slice], Tensor]
    """Some rows of a tensor, by its name."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], weight: float) -> "Reply":
        """A reply that is in memory."""
        return cls(weight, tensors.keys(), lambda name, rows: tensors[name][rows])


class Aggregator(ABC):
    """Mean of clients' tensors, whatever that means for low-rank factors.

    Tensors are read layer by layer and client by client, so memory does not grow with the number of clients. Weights need
    not sum to one: they are normalised over those who answered. A client's rank may be smaller than the run's.
    """

    keeps_basis = True
    """Whether a factor's rows mean the same from round to round, so that differences between rounds mean something."""
    base_weights = False
    """Whether the adapted layers' own weights change too; they are then among the global tensors, and travel down."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def up(self, name: str, number: int) -> bool:
        """Whether clients train a tensor in round ``number``, from 1, and send it; what they don't train stays as it is.

        It is asked only about tensors that clients can train.
        """
        return True

    def down(self, name: str, number: int) -> bool:
        """Whether a tensor is different after round ``number``, and so travels down.

        It is asked about all global tensors, among them base weights, which clients may not train.
        """
        return self.up(name, number)

    def aggregate(self, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """The global tensors after a round; what no reply holds stays as it is, unless ``factors`` changes it.

        Args:
            replies: in the order of the sites' names.
            previous: the global tensors that the clients started from; they give names and shapes.
            number: of the round, from 1.

        Returns:
            float32, contiguous, under the same names.

        Raises:
            ValueError: no client has a weight above 0.
        """
        replies = [reply for reply in replies if reply.weight > 0]
        if not replies:
            raise ValueError("no client had a weight above 0")
        layers = lora_layers(previous)
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
        """What is new of a layer, by names: its factors B (out, rank) and A (rank, in)."""

    def average(self, name: str, replies: Sequence[Reply], previous: Mapping[str, Tensor]) -> Tensor:
        """Σ w·θ / Σ w of one tensor over those who sent it (FedAvg, McMahan et al. 2017, arXiv 1602.05629)."""
        senders = [reply for reply in replies if name in reply.names]
        if not senders:
            return previous[name]
        total = torch.zeros(previous[name].shape, dtype=torch.float64)
        for reply in senders:
            # float64, so that the mean of equal tensors is that tensor.
            part = reply.read(name, ALL).double()
            # Of a smaller rank, the rows and columns that are missing count as zeros (HetLoRA, arXiv 2401.06432).
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
    """Names of the layers that carry low-rank factors, in order."""
    return sorted(name.removesuffix(A) for name in names if name.endswith(A))
