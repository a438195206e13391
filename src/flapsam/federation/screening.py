"""Which sites' changes the server leaves out of a round, because they are far larger than the others'."""

from collections.abc import Iterable, Mapping
from math import hypot
from statistics import median_low

import torch
from torch import Tensor


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all numbers in these tensors together, computed in float64."""
    return hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))


def too_large(changes: Mapping[str, float], most: float | None) -> dict[str, str]:
    """Find the sites whose change is more than ``most`` times the lower median of all changes.

    The lower median is the middle value, and the lower one of the middle two if their number is even. With two sites it is
    the smaller change. Fewer than half of the sites cannot raise it above the largest honest change.

    Args:
        changes: site → norm of its change.
        most: the factor. None: no change is too large.

    Returns:
        Site → the reason to leave it out. Empty if nothing changed, or if there is only one site.
    """
    if most is None or not changes:
        return {}
    usual = median_low(changes.values())
    if usual == 0:
        return {}
    return {
        site: f"its change is {change / usual:.3g} times the others' (the limit is {most:g}: rounds.max_change)"
        for site, change in changes.items()
        # A number that is not finite is not below any limit.
        if not change <= most * usual
    }
