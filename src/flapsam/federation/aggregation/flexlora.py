"""The mean of the products B·A, reduced to the adapters' rank by a truncated SVD."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flapsam.federation.aggregation.aggregator import ALL, A, Aggregator, B, Reply, mean_product


class FlexLora(Aggregator):
    """Low-rank factors by SVD of Σ w·B·A, everything else by mean (FlexLoRA, arXiv 2402.11505, section 4).

    The result is the best rank-r approximation of the mean product, and exact where that product has rank r. Clients' ranks
    may differ, and for a smaller rank the first rows are the best approximation. B holds the left singular vectors, and A
    the singular values times the right ones. Every trained tensor travels up and down.

    With few clients the product is not formed, because the clients' stacked factors represent it. Where these would be
    larger than the layer itself, the product is formed, so memory is bounded by the layer's size.
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

        Where P has a smaller rank, S and Vᵀ are filled with zeros, and so is U where it has too few columns.
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
        # Uᵀ·P = S·Vᵀ. P was squared on the way, so values below 1e-8 of the greatest are only float64's rounding error.
        s = projected.norm(dim=1)
        s = torch.where(s > 1e-8 * s.max(), s, 0.0)
        vt = torch.where(s[:, None] > 0, projected / s[:, None], 0.0)
        missing = self.rank - len(s)
        return F.pad(u, (0, missing)).float(), F.pad(s, (0, missing)).float(), F.pad(vt, (0, 0, 0, missing)).float()


def stacked(layer: str, replies: Sequence[Reply]) -> tuple[Tensor, Tensor]:
    """Factors of a layer's mean product, stacked from all clients: (out, Σ rank) and (Σ rank, in), float64."""
    total = sum(reply.weight for reply in replies)
    left = [reply.read(layer + B, ALL).double() * (reply.weight / total) for reply in replies]
    return torch.cat(left, dim=1), torch.cat([reply.read(layer + A, ALL).double() for reply in replies])


def left_vectors(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors (out, rank) of ``left`` (out, k) · ``right`` (k, in), without forming it."""
    # With left = Q·T, the vectors are Q times the eigenvectors of T·(right·rightᵀ)·Tᵀ. Q is not formed either.
    reflectors, scales = torch.geqrf(left)
    triangle = reflectors[: left.shape[1]].triu()
    vectors = _greatest(triangle @ (right @ right.T) @ triangle.T, rank)
    return torch.ormqr(reflectors, scales, F.pad(vectors, (0, 0, 0, len(left) - len(vectors))))


def _greatest(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the ``count`` greatest eigenvalues as columns, greatest first."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :count]
