"""FlexLoRA with factors that stay close to the previous ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, B, Reply
from flapsam.federation.aggregation.flexlora import FlexLora


class FlexLoraAligned(FlexLora):
    """FlexLoRA in the basis of the clients' mean A. The product is that of ``flexlora`` unless Ā·V is nearly singular.

    Among all factors with rows in the row space V of the truncated product, A = Ā·V·Vᵀ is the closest to the mean Ā. With
    B = U·S·(Ā·V)⁻¹ it yields that product. The pseudo-inverse drops directions in which Ā·V is below a thousandth of its
    largest singular value. Factors that no client changed are returned as they were if both have full rank. Traffic as with
    ``flexlora``.
    """

    keeps_basis = True

    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        u, s, vt = (part.double() for part in self.decomposed(layer, replies, previous))
        inner = self.average(layer + A, replies, previous).double() @ vt.T
        return {layer + B: (u * s @ torch.linalg.pinv(inner, rtol=1e-3)).float(), layer + A: (inner @ vt).float()}
