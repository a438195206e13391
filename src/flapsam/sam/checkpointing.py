"""Gradient checkpointing, which saves memory and costs time."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from flapsam.sam.network import Sam


def checkpoint_layers(network: Sam) -> None:
    """Let the encoder's blocks keep only their inputs, and recompute the rest in the backward pass."""
    for layer in network.vision_encoder.layers:
        switched: Any = layer
        switched.gradient_checkpointing = True
        switched._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
