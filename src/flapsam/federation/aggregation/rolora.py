"""FedAvg of B and A in alternate rounds."""

from flapsam.federation.aggregation.aggregator import A, B
from flapsam.federation.aggregation.fedavg import FedAvg


class RoLora(FedAvg):
    """B trains in odd rounds with A fixed, and A in even rounds with B fixed (RoLoRA, arXiv 2502.01755).

    Exact in each round, because one of the factors is the same for all clients. Only the factor that trains travels, up and
    down, which halves the factors' traffic.
    """

    def up(self, name: str, number: int) -> bool:
        """Everything trains but the factor that is fixed in this round."""
        return not name.endswith(A if number % 2 == 1 else B)
