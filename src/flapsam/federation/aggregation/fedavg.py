"""Plain FedAvg of every tensor, low-rank factors among them."""

from collections.abc import Mapping

from torch import Tensor

from flapsam.federation.aggregation.aggregator import Aggregator, WeightedMean


class FedAvg(Aggregator):
    """Σ w·θ of all tensors (McMahan et al. 2017, arXiv 1602.05629).

    Exact for everything but low-rank factors: the mean of A and the mean of B do not multiply to the mean of B·A.
    """

    def __init__(self, rank: int) -> None:
        self.mean = WeightedMean()

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        self.mean.add(tensors, weight)

    def result(self) -> dict[str, Tensor]:
        return self.mean.result()
