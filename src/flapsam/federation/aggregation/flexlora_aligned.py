"""FlexLoRA whose factors stay close to the previous ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, B, Reply
from flapsam.federation.aggregation.flexlora import FlexLora


class FlexLoraAligned(FlexLora):
    """As ``flexlora``, in the basis of the clients' mean A. The same product, if Ā·V is not near singular; the same traffic.

    A = Ā·V·Vᵀ is the closest to the mean Ā among all factors with rows in the row space V of the truncated product, and
    B = U·S·(Ā·V)⁻¹ gives that product. Directions in which Ā·V is below a thousandth of its largest singular value the
    pseudo-inverse leaves out of it. Factors that nobody changed come back if both have full rank.
    """

    keeps_basis = True

    def factors(
        self, layer: str, replies: Sequence[Reply], previous: Mapping[str, Tensor], number: int
    ) -> dict[str, Tensor]:
        u, s, vt = (part.double() for part in self.decomposed(layer, replies, previous))
        inner = self.average(layer + A, replies, previous).double() @ vt.T
        return {layer + B: (u * s @ torch.linalg.pinv(inner, rtol=1e-3)).float(), layer + A: (inner @ vt).float()}
