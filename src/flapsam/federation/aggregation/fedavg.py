"""Plain FedAvg of every tensor, including low-rank factors."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, Aggregator, B, Reply


class FedAvg(Aggregator):
    """Σ w·θ of all tensors (McMahan et al. 2017, arXiv 1602.05629).

    Exact for everything but low-rank factors, because the mean of B times the mean of A is not the mean of B·A. Every
    trained tensor travels up and down.
    """

    sums = True

    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        return {layer + part: self.average(layer + part, replies, previous) for part in (A, B)}
