"""The network for prediction only: adapters merged into their layers, and query, key and value fused into one product."""

from typing import Any

import torch
from torch import Tensor, nn

from flapsam.sam.encoder import EncoderAttention, attend
from flapsam.sam.lora import merge_adapters
from flapsam.sam.network import Sam


class FusedAttention(nn.Module):
    """``EncoderAttention`` with one product for query, key and value, and with relative positions looked up beforehand."""

    def __init__(self, attention: EncoderAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = nn.utils.skip_init(nn.Linear, parts[0].in_features, 3 * parts[0].out_features)
        self.qkv.weight = nn.Parameter(torch.cat([layer.weight for layer in parts]), requires_grad=False)
        self.qkv.bias = nn.Parameter(torch.cat([layer.bias for layer in parts]), requires_grad=False)
        self.proj = attention.proj
        self.along_h: Tensor
        self.along_w: Tensor
        self.register_buffer("along_h", attention.rel_pos_h[attention.offset].detach())
        self.register_buffer("along_w", attention.rel_pos_w[attention.offset].detach())

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Attend over tokens (batch, height, width, channels). Return the same shape, and None for the attention weights."""
        batch, height, width, channels = hidden_states.shape
        tokens = hidden_states.reshape(batch, height * width, channels)
        query, key, value = self.qkv(tokens).view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value, self.along_h, self.along_w)
        return self.proj(mixed).view(batch, height, width, channels), None


def fuse(network: Sam) -> Sam:
    """Merge the adapters and fuse the encoder's attention, in place. The network can only predict afterwards."""
    merge_adapters(network)
    layers: Any = network.vision_encoder.layers
    for layer in layers:
        if layer.window_size == network.image_size // network.sizes.patch:
            # One window covers the whole image, so cutting it out and putting it back would only copy it.
            layer.window_size = 0
        layer.attn = FusedAttention(layer.attn)
    return network.eval()
