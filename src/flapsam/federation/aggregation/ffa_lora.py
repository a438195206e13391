"""FedAvg with A frozen."""

from flapsam.federation.aggregation.aggregator import A
from flapsam.federation.aggregation.fedavg import FedAvg


class FfaLora(FedAvg):
    """A keeps its random initial values, and B is Σ w·B (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313).

    Exact, because with the same A at all clients the mean of B·A is the mean of B times A. A never travels, neither up nor
    down, which halves the factors' traffic. The price is that adapters learn only within A's row space.
    """

    def up(self, name: str, number: int) -> bool:
        return not name.endswith(A)
