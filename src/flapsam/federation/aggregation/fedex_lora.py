"""FedAvg that adds the error of the factors' product to the layers' own weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, B, Reply, mean_product
from flapsam.federation.aggregation.fedavg import FedAvg


class FedExLora(FedAvg):
    """Averages the factors and adds what their product lacks, Σ w·B·A / Σ w − B̄·Ā, to the layer's own weight
    (FedEx-LoRA, arXiv 2410.09432).

    Exact, apart from the rounding of the weights to float32. The traffic up is that of ``fedavg``. Down, the adapted
    layers' own weights, which are dense, travel too in each round. Where clients also train these weights, the residual is
    added to their mean.
    """

    sums = False
    base_weights = True

    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        result = super().factors(layer, replies, previous, number)
        weight = layer + ".weight"
        residual = mean_product(layer, replies) - result[layer + B].double() @ result[layer + A].double()
        return {**result, weight: (self.average(weight, replies, previous).double() + residual).float()}
