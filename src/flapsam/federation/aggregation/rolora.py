"""FedAvg of B and A in turns."""

from flapsam.federation.aggregation.aggregator import A, B
from flapsam.federation.aggregation.fedavg import FedAvg


class RoLora(FedAvg):
    """In odd rounds B trains with A fixed, in even rounds A with B fixed (RoLoRA, arXiv 2502.01755).

    Exact in each round, as one of the factors is the same for all. Only the factor that trains travels, up and down: half
    the factors' traffic.
    """

    def up(self, name: str, number: int) -> bool:
        """Everything but the factor whose turn it is not."""
        return not name.endswith(A if number % 2 == 1 else B)
