"""FedAvg of the factors, with B corrected for the product."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, B, Reply, mean_product
from flapsam.federation.aggregation.fedavg import FedAvg

RIDGE = 0.01
"""λ, as a fraction of the mean diagonal of Ā·Āᵀ."""


class LoraFair(FedAvg):
    """Factors by mean, then B̄ + ΔB, where ΔB minimises ‖P − (B̄ + ΔB)·Ā‖² + λ·‖ΔB‖² (LoRA-FAIR, arXiv 2411.14961).

    P is the mean product Σ w·B·A / Σ w. The paper maximises the cosine similarity of the two products by gradient steps.
    This is its least-squares form, which has a closed-form solution. Not exact: apart from the ridge λ, the result is the
    closest to P that the row space of Ā allows. Traffic as with ``fedavg``.
    """

    sums = False

    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        """B̄ + ΔB (out, rank) and Ā (rank, in)."""
        result = super().factors(layer, replies, previous, number)
        outward, inward = result[layer + B].double(), result[layer + A].double()
        gram = inward @ inward.T
        # For Ā = 0, the smallest positive number keeps the system solvable, and ΔB = 0.
        ridge = (RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
        missing = (mean_product(layer, replies) - outward @ inward) @ inward.T
        # ΔB·(Ā·Āᵀ + λ) = (P − B̄·Ā)·Āᵀ
        change = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), missing, left=False)
        return {**result, layer + B: (outward + change).float()}
