"""What layers do under autocast. The device ``meta``, whose tensors have shapes alone, knows none."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(values: Tensor) -> Tensor:
    """Values in the type in which autocast multiplies, converted once for all layers that use them."""
    kind = values.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return values.to(torch.get_autocast_dtype(kind)) if enabled else values


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context in which autocast is off."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()  # pyright: ignore[reportReturnType]
