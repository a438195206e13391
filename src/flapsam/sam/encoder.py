"""SAM's image encoder from transformers, with the fused query-key-value projection split into three layers."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from flapsam.sam.architecture import Architecture


class EncoderAttention(nn.Module):
    """Multi-head self-attention with decomposed relative positions, over a square grid of tokens.

    SAM has one layer for the three projections. Separate layers allow low-rank adapters on query and value alone.
    """

    def __init__(self, width: int, heads: int, grid: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))
        index = torch.arange(grid)
        self.offset: Tensor
        self.register_buffer("offset", index[:, None] - index[None, :] + grid - 1, persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Attend over tokens (batch, height, width, channels). Return the same shape, and None for the attention weights."""
        batch, height, width, channels = hidden_states.shape
        tokens = hidden_states.reshape(batch, height * width, channels)
        query, key, value = (
            projection(tokens).view(batch, height * width, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(query, key, value, self.rel_pos_h[self.offset], self.rel_pos_w[self.offset])
        return self.proj(mixed).view(batch, height, width, channels), None


def attend(query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """Attention over a grid of tokens with decomposed relative positions.

    Args:
        query: queries (batch, heads, height · width, channels of a head).
        key: keys of the same shape.
        value: values of the same shape.
        along_h: relative position embeddings from row to row (height, height, channels of a head).
        along_w: relative position embeddings from column to column (width, width, channels of a head).

    Returns:
        The attended values (batch, height · width, channels).
    """
    grid = query.unflatten(2, (len(along_h), len(along_w)))
    bias_h = torch.einsum("bnhwc,hkc->bnhwk", grid, along_h)
    bias_w = torch.einsum("bnhwc,wkc->bnhwk", grid, along_w)
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


def image_encoder(sizes: Architecture, image_size: int) -> SamVisionEncoder:
    """Build the encoder: (batch, 3, size, size) → (batch, decoder width, tokens, tokens)."""
    tokens = sizes.tokens(image_size)
    config = SamVisionConfig(
        hidden_size=sizes.width,
        output_channels=sizes.decoder_width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        image_size=image_size,
        patch_size=sizes.patch,
        window_size=sizes.window,
        global_attn_indexes=list(sizes.global_blocks),
        num_pos_feats=sizes.decoder_width // 2,
    )
    config._attn_implementation = "sdpa"
    encoder = SamVisionEncoder(config)
    for block, layer in enumerate(encoder.layers):
        grid = tokens if block in sizes.global_blocks else sizes.window
        layer.attn = EncoderAttention(sizes.width, sizes.heads, grid)
    return encoder


def checkpoint_layers(encoder: SamVisionEncoder) -> None:
    """Turn on gradient checkpointing: layers keep only their inputs and recompute the rest in the backward pass."""
    for layer in encoder.layers:
        switched: Any = layer
        switched.gradient_checkpointing = True
        switched._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
