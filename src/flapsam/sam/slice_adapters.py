"""Small adapters in which neighbouring slices of a volume meet, after each attention of the image encoder.

After MA-SAM (arXiv 2309.08842), whose adapters have a 3-D convolution between two linear layers. Here, the convolution is
depthwise and reaches one slice to either side, so that an adapter costs little and slices can be streamed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHILD = "slices"
"""Name of a block's adapter among the block's parts."""


@dataclass
class Stack:
    """How the slices of a batch belong together. All adapters of a network share it."""

    slices: int = 1
    """Number of slices in the batch."""
    depth: int = 1
    """Number of consecutive slices of a volume that follow one another in the batch."""


class SliceAdapter(nn.Module):
    """A bottleneck whose channels are mixed with those of the slice before and after, added to what it is given.

    It starts as the identity. The first and the last slice of a run are their own neighbours beyond its ends.
    """

    def __init__(self, width: int, bottleneck: int, stack: Stack) -> None:
        """Create an adapter.

        Args:
            width: channels of the tokens.
            bottleneck: channels between the two linear layers.
            stack: how the slices of a batch belong together.
        """
        super().__init__()
        self.stack = stack
        self.down = nn.Linear(width, bottleneck)
        # Before training, a slice sees only itself.
        self.mix = nn.Parameter(torch.tensor([0.0, 1.0, 0.0])[:, None].repeat(1, bottleneck))
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Transform tokens (slices · windows, …, channels), slice by slice."""
        depth = self.stack.depth
        hidden = self.down(rows)
        runs = hidden.reshape(self.stack.slices // depth, depth, -1, hidden.shape[-1])
        before, after = torch.cat([runs[:, :1], runs[:, :-1]], dim=1), torch.cat([runs[:, 1:], runs[:, -1:]], dim=1)
        mixed = before * self.mix[0] + runs * self.mix[1] + after * self.mix[2]
        return rows + self.up(F.gelu(mixed).reshape(hidden.shape))

    def after_attention(self, _attention: nn.Module, _inputs: Any, output: Any) -> Any:
        """Transform what an attention returns: its tokens, alone or as the first of several values."""
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


def add_slice_adapters(encoder: Any, bottleneck: int, stack: Stack) -> None:
    """Give each block of an image encoder an adapter, in place."""
    for layer in encoder.layers:
        layer.add_module(CHILD, SliceAdapter(layer.attn.proj.out_features, bottleneck, stack))
    connect(encoder)


def connect(encoder: Any) -> None:
    """Let each block's adapter transform what the block's attention returns. Needed again when attentions are replaced."""
    for layer, adapter in _adapted(encoder):
        layer.attn.register_forward_hook(adapter.after_attention)


def reach(encoder: Any) -> int:
    """Number of slices on either side that a slice's embedding depends on: one for each adapter."""
    return sum(1 for _ in _adapted(encoder))


def _adapted(encoder: Any) -> Iterator[tuple[Any, SliceAdapter]]:
    for layer in encoder.layers:
        if isinstance(adapter := getattr(layer, CHILD, None), SliceAdapter):
            yield layer, adapter
