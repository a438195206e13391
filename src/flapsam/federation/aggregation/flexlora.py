"""The mean of the products B·A, cut back to the rank by a truncated SVD."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flapsam.federation.aggregation.aggregator import ALL, A, Aggregator, B, Reply, mean_product


class FlexLora(Aggregator):
    """Low-rank factors by SVD of Σ w·B·A, everything else by mean (FlexLoRA, arXiv 2402.11505, section 4).

    The best rank-r approximation of the mean product; exact where that product has rank r. Clients' ranks may differ, and
    the first rows are the best for a smaller one. B gets the left singular vectors, A the singular values with the right
    ones. Every trained tensor travels, up and down.

    With few clients the product is not formed: their factors, stacked, are factors of it. Where these would be larger than
    the layer itself, it is, so that memory is bounded by the layer's size.
    """

    keeps_basis = False

    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        u, s, vt = self.decomposed(layer, replies, previous)
        return {layer + B: u, layer + A: s[:, None] * vt}

    def decomposed(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The truncated SVD of a layer's mean product P: U (out, rank), S (rank) and Vᵀ (rank, in).

        Zeros fill what P's rank lacks in S and Vᵀ, and in U where it has too few columns.
        """
        outward, inward = previous[layer + B], previous[layer + A]
        if len(replies) * self.rank <= min(outward.shape[0], inward.shape[1]):
            left, right = stacked(layer, replies)
            u = left_vectors(left, right, self.rank)
            projected = u.T @ left @ right
        else:
            product = mean_product(layer, replies)
            u = _greatest(product @ product.T, self.rank)
            projected = u.T @ product
        # Uᵀ·P = S·Vᵀ, and P was squared on the way: below 1e-8 of the greatest there is nothing but float64's rounding.
        s = projected.norm(dim=1)
        s = torch.where(s > 1e-8 * s.max(), s, 0.0)
        vt = torch.where(s[:, None] > 0, projected / s[:, None], 0.0)
        missing = self.rank - len(s)
        return F.pad(u, (0, missing)).float(), F.pad(s, (0, missing)).float(), F.pad(vt, (0, 0, 0, missing)).float()


def stacked(layer: str, replies: Sequence[Reply]) -> tuple[Tensor, Tensor]:
    """Factors of a layer's mean product, as wide as the clients' ranks together: (out, Σ rank) and (Σ rank, in), float64."""
    total = sum(reply.weight for reply in replies)
    left = [reply.read(layer + B, ALL).double() * (reply.weight / total) for reply in replies]
    return torch.cat(left, dim=1), torch.cat([reply.read(layer + A, ALL).double() for reply in replies])


def left_vectors(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors (out, rank) of ``left`` (out, k) · ``right`` (k, in), which is not formed."""
    # left = Q·T, so they are Q times the eigenvectors of T·(right·rightᵀ)·Tᵀ. Q is not formed either.
    reflectors, scales = torch.geqrf(left)
    rest = reflectors[: left.shape[1]].triu()
    vectors = _greatest(rest @ (right @ right.T) @ rest.T, rank)
    return torch.ormqr(reflectors, scales, F.pad(vectors, (0, 0, 0, len(left) - len(vectors))))


def _greatest(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the greatest eigenvalues, greatest first, as columns."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :count]
