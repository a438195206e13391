"""Plain FedAvg of every tensor, low-rank factors among them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, Aggregator, B, Reply


class FedAvg(Aggregator):
    """Σ w·θ of all tensors (McMahan et al. 2017, arXiv 1602.05629).

    Exact for everything but low-rank factors: the mean of A and the mean of B do not multiply to the mean of B·A. Every
    trained tensor travels, up and down.
    """

    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        return {layer + part: self.average(layer + part, replies, previous) for part in (A, B)}
