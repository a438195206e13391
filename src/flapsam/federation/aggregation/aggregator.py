"""What every aggregator is: it takes clients' tensors one after another and gives the global ones."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"


class Aggregator(ABC):
    """Mean of clients' tensors. One object serves one round.

    Clients are added one at a time and not kept, so memory does not grow with their number. Weights need not sum to one:
    they are normalised at the end over those who answered.
    """

    @abstractmethod
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Take one client's tensors."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """The global tensors, float32, under the clients' names.

        Raises:
            ValueError: no client had a weight above 0.
        """


class WeightedMean:
    """Σ w·θ / Σ w, tensor by tensor (McMahan et al. 2017, arXiv 1602.05629)."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Take one client's tensors."""
        for name, tensor in tensors.items():
            # float64, so that the mean of equal tensors is that tensor.
            part = tensor.double() * weight
            self.sums[name] = self.sums[name].add_(part) if name in self.sums else part
        self.weight += weight

    def result(self) -> dict[str, Tensor]:
        """The mean, float32."""
        if self.weight <= 0:
            raise ValueError("no client had a weight above 0")
        return {name: (total / self.weight).to(torch.float32) for name, total in self.sums.items()}


def lora_layers(names: Iterable[str]) -> list[str]:
    """Names of the layers that carry low-rank factors, in order."""
    return sorted(name.removesuffix(A) for name in names if name.endswith(A))
