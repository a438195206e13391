"""The mean of the products B·A, cut back to the rank by a truncated SVD."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, Aggregator, B, WeightedMean, lora_layers


class FlexLora(Aggregator):
    """Low-rank factors by SVD of Σ w·B·A, everything else by mean (FlexLoRA, arXiv 2402.11505, section 4).

    The best rank-r approximation of the mean product; exact where that product has rank r. Clients' ranks may differ.
    B gets the left singular vectors, A the singular values with the right ones. The product is not formed: the factors are
    stacked, and once their joint rank would pass the smaller side of the layer they are shrunk to it.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.mean = WeightedMean()
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        layers = lora_layers(tensors)
        factors = {name + side for name in layers for side in (A, B)}
        self.mean.add({name: tensor for name, tensor in tensors.items() if name not in factors}, weight)
        for name in layers:
            # float64, because shrinking again and again would add its rounding up.
            left, right = tensors[name + B].double() * weight, tensors[name + A].double()
            if name in self.left:
                left, right = torch.cat([self.left[name], left], dim=1), torch.cat([self.right[name], right])
            if left.shape[1] > min(left.shape[0], right.shape[1]):
                left, right = _shrink(left, right)
            self.left[name], self.right[name] = left, right

    def result(self) -> dict[str, Tensor]:
        tensors = self.mean.result()
        for name, left in self.left.items():
            left, right = (left / self.mean.weight).float(), self.right[name].float()
            tensors[name + B], tensors[name + A] = truncate(left, right, self.rank)
        return dict(sorted(tensors.items()))


def truncate(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-``rank`` approximation of ``left`` · ``right``.

    Args:
        left: (out, k).
        right: (k, in).
        rank: of the result; where the product has less, the rest is filled with zeros.

    Returns:
        U (out, rank) with orthonormal columns, and S·Vᵀ (rank, in).
    """
    left_basis, left_rest = torch.linalg.qr(left)
    right_basis, right_rest = torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    outward, inward = left_basis @ u, (s[:, None] * vt) @ right_basis.T
    missing = rank - len(s)
    if missing > 0:
        outward = torch.cat([outward, outward.new_zeros(len(outward), missing)], dim=1)
        inward = torch.cat([inward, inward.new_zeros(missing, inward.shape[1])])
    return outward.contiguous(), inward.contiguous()


def _shrink(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with no more columns than the product's smaller side."""
    if left.shape[0] <= right.shape[1]:
        basis, rest = torch.linalg.qr(left)
        return basis, rest @ right
    basis, rest = torch.linalg.qr(right.T)
    return left @ rest.T, basis.T
