"""Frozen weights in half precision while a network trains under autocast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flapsam.sam.network import Sam


@contextmanager
def halved(network: Sam, precision: str) -> Iterator[None]:
    """Hold the frozen weights of linear layers in bfloat16, if that is the precision, and restore them afterwards.

    Autocast would convert them to the same bits in every pass. It remembers such a conversion only for weights that train.

    Args:
        network: the network. It may only be called under autocast meanwhile.
        precision: nothing happens unless it is ``bf16``.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)] if precision == "bf16" else []
    frozen = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None and not p.requires_grad]
    whole = [parameter.data for parameter in frozen]
    try:
        for parameter in frozen:
            parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in zip(frozen, whole, strict=True):
            parameter.data = data
