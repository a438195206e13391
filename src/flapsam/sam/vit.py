"""The family of SAM and MedSAM: a plain vision transformer (Segment Anything, arXiv 2304.02643)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from flapsam.sam.architecture import Architecture
from flapsam.sam.autocast import as_autocast
from flapsam.sam.decoder import MaskDecoder
from flapsam.sam.naming import (
    DECODER_FROM_META,
    DECODER_IN_TRANSFORMERS,
    NECK_FROM_META,
    from_transformers,
    renamed,
    split_thirds,
    to_transformers,
)

if TYPE_CHECKING:
    from flapsam.sam.network import Sam

FROM_META = (
    *NECK_FROM_META,
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.blocks\.(\d+)\.", r".layers.\1."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    *DECODER_FROM_META,
)
FROM_TRANSFORMERS = from_transformers(DECODER_IN_TRANSFORMERS)


@dataclass(frozen=True, kw_only=True)
class Vit(Architecture):
    """A plain vision transformer with decomposed relative positions, in windows but for a few global blocks."""

    width: int
    """Channels of the image encoder's tokens."""
    heads: int
    global_blocks: tuple[int, ...]
    """Blocks that attend over the whole image; the others attend within windows."""
    window: int = 14
    """Side of a window, in tokens."""

    whose: ClassVar[Mapping[str, str]] = {
        "meta": "Meta's",
        "transformers": "those of transformers",
        "flapsam": "flapsam's own",
    }

    def encoder(self, image_size: int) -> "VitEncoder":
        """Build the encoder: (batch, 3, size, size) → (batch, decoder width, tokens, tokens)."""
        return VitEncoder(self, image_size)

    def decoder(self, masks: int) -> MaskDecoder:
        """Build SAM's decoder."""
        return MaskDecoder(self, masks)

    def values_a_slice(self, image_size: int) -> int:
        """The attention bias of a global block, and the hidden layer of an MLP."""
        tokens = (image_size // self.stride) ** 2
        return self.heads * tokens**2 + 4 * self.width * tokens

    @classmethod
    def naming_of(cls, state: Mapping[str, Tensor]) -> str | None:
        """Meta's names, those of ``SamModel``, or the network's own."""
        positions = state.get("image_encoder.pos_embed")
        if "image_encoder.patch_embed.proj.weight" in state and (positions is None or positions.ndim == 4):
            return "meta"
        if "vision_encoder.patch_embed.projection.weight" in state:
            return "transformers" if any(".qkv." in name for name in state) else "flapsam"
        return None

    @classmethod
    def to_own_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors, and split each fused qkv into thirds."""
        rules = {"meta": FROM_META, "transformers": FROM_TRANSFORMERS}.get(cls.naming_of(state) or "meta", ())
        return split_thirds(renamed(state, rules))

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Compare width, depth, heads, patch size and the decoder's width."""
        width, _, patch, _ = state["vision_encoder.patch_embed.projection.weight"].shape
        decoder_width = len(state["vision_encoder.neck.conv1.weight"])
        rel_pos = [tensor for name, tensor in state.items() if name.endswith(".attn.rel_pos_h")]
        if not rel_pos:
            return False
        actual = (width, len(rel_pos), width // rel_pos[0].shape[1], patch, decoder_width)
        return actual == (self.width, self.depth, self.heads, self.stride, self.decoder_width)

    def fitted(self, state: Mapping[str, Tensor], image_size: int) -> dict[str, Tensor]:
        """Resize position embeddings bilinearly.

        ``pos_embed`` is resized to the new token grid. ``rel_pos_h`` and ``rel_pos_w`` of the global blocks are resized to
        2·tokens − 1 rows, while windowed blocks keep theirs.
        """
        tokens = self.tokens(image_size)
        rows = 2 * tokens - 1
        result = dict(state)
        for name, tensor in state.items():
            if name == "vision_encoder.pos_embed" and tensor.shape[1:3] != (tokens, tokens):
                grid = F.interpolate(tensor.float().permute(0, 3, 1, 2), (tokens, tokens), mode="bilinear")
                result[name] = grid.permute(0, 2, 3, 1)
            block = re.match(r"vision_encoder\.layers\.(\d+)\.attn\.rel_pos_[hw]$", name)
            if block and int(block[1]) in self.global_blocks and len(tensor) != rows:
                # Interpolate it as a one-channel image whose width, the channels of a head, stays the same.
                result[name] = F.interpolate(tensor.float()[None, None], (rows, tensor.shape[1]), mode="bilinear")[0, 0]
        return result

    @classmethod
    def trained_size(cls, state: Mapping[str, Tensor]) -> int:
        """The number of positions, times the side of a patch."""
        patch = state["vision_encoder.patch_embed.projection.weight"].shape[-1]
        return state["vision_encoder.pos_embed"].shape[1] * patch

    def to_transformers(self, network: "Sam") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The network for ``SamModel.from_pretrained``. Its decoder counts one mask fewer than it has mask tokens."""
        prompt = SamPromptEncoderConfig(
            hidden_size=self.decoder_width, image_size=network.image_size, patch_size=self.stride
        )
        decoder = network.mask_decoder.transformer.config.to_dict()
        decoder |= {"num_multimask_outputs": network.masks - 1, "iou_head_hidden_dim": self.iou_width}
        config = SamConfig(
            vision_config=network.vision_encoder.config, prompt_encoder_config=prompt, mask_decoder_config=decoder
        ).to_dict()
        return to_transformers(network.state_dict()), {**config, "architectures": ["SamModel"]}


class VitEncoder(SamVisionEncoder):
    """SAM's image encoder from transformers, with the fused query-key-value projection split into three layers."""

    def __init__(self, sizes: Vit, image_size: int) -> None:
        tokens = sizes.tokens(image_size)
        config: Any = SamVisionConfig(
            hidden_size=sizes.width,
            output_channels=sizes.decoder_width,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            image_size=image_size,
            patch_size=sizes.stride,
            window_size=sizes.window,
            global_attn_indexes=list(sizes.global_blocks),
            num_pos_feats=sizes.decoder_width // 2,
        )
        config._attn_implementation = "sdpa"
        super().__init__(config)
        self.tokens = tokens
        for block, layer in enumerate(self.layers):
            grid = tokens if block in sizes.global_blocks else sizes.window
            layer.attn = EncoderAttention(sizes.width, sizes.heads, grid)
            switched: Any = layer
            if switched.window_size == tokens:
                # One window covers the whole image, so cutting it out and putting it back would only copy it.
                switched.window_size = 0

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Embed images."""
        answer: Any = super().forward(images)
        return answer.last_hidden_state

    def fuse(self) -> None:
        """Compute query, key and value in one product from now on."""
        for layer in self.layers:
            switched: Any = layer
            switched.attn = FusedAttention(switched.attn)


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
        tokens = as_autocast(hidden_states).reshape(batch, height * width, channels)
        query, key, value = (
            projection(tokens).view(batch, height * width, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(query, key, value, self.rel_pos_h[self.offset], self.rel_pos_w[self.offset])
        return self.proj(mixed).view(batch, height, width, channels), None


class FusedAttention(nn.Module):
    """``EncoderAttention`` with one product for query, key and value, and with relative positions looked up beforehand."""

    def __init__(self, attention: EncoderAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.qkv = fused_projection(attention.q_proj, attention.k_proj, attention.v_proj)
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


def fused_projection(*projections: nn.Linear) -> nn.Linear:
    """One frozen linear layer whose outputs are those of the given ones, one after the other."""
    fused: Any = nn.utils.skip_init(nn.Linear, projections[0].in_features, sum(layer.out_features for layer in projections))
    fused.weight = nn.Parameter(torch.cat([layer.weight for layer in projections]), requires_grad=False)
    fused.bias = nn.Parameter(torch.cat([layer.bias for layer in projections]), requires_grad=False)
    return fused


def attend(query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """Attention over a grid of tokens with decomposed relative positions.

    The scores are q·k/√d + q·Rh + q·Rw (Segment Anything, arXiv 2304.02643, as in ViTDet, arXiv 2203.16527). On a CPU, the
    positions are an additive mask. Elsewhere, they are channels of query and key, because the fastest kernels of GPUs take
    no mask.

    Args:
        query: queries (batch, heads, height · width, channels of a head).
        key: keys of the same shape.
        value: values of the same shape.
        along_h: relative position embeddings from row to row (height, height, channels of a head).
        along_w: relative position embeddings from column to column (width, width, channels of a head).

    Returns:
        The attended values (batch, height · width, channels).
    """
    mix = masked if query.device.type == "cpu" else folded
    return mix(query, key, value, along_h, along_w).transpose(1, 2).flatten(2)


def masked(query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """Attention whose scores get a mask: that of a key's row, plus that of its column. Arguments are those of ``attend``.

    Returns:
        The attended values, in the shape of the queries.
    """
    grid = query.unflatten(2, (len(along_h), len(along_w)))
    bias_h = torch.einsum("bnhwc,hkc->bnhwk", grid, along_h)
    bias_w = torch.einsum("bnhwc,wkc->bnhwk", grid, along_w)
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def folded(query: Tensor, key: Tensor, value: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """The same as ``masked``, as products of q' = [q, q·√d·Rh, q·√d·Rw, 0] and k' = [k, e(row), e(column), 0].

    Here, e is a unit vector, so that q'·k'/√d is the whole score. Kernels take heads of a multiple of eight channels, and
    values with as many.
    """
    height, width, channels = len(along_h), len(along_w), query.shape[-1]
    tables = torch.cat([along_h[:, None].expand(-1, width, -1, -1), along_w.expand(height, -1, -1, -1)], dim=2)
    grid = query.unflatten(2, (height, width))
    scores = torch.einsum("bnhwc,hwkc->bnhwk", grid, tables * channels**0.5).flatten(2, 3)
    kind = scores.dtype
    places = _places(height, width, kind, query.device)
    few = (*query.shape[:3], -(channels + height + width) % 8)
    many = (*query.shape[:3], few[-1] + height + width)
    nothing = torch.zeros((), dtype=kind, device=query.device)
    whole_query = torch.cat([query.to(kind), scores, nothing.expand(few)], dim=-1)
    whole_key = torch.cat([key.to(kind), places.expand(*key.shape[:2], -1, -1), nothing.expand(few)], dim=-1)
    whole_value = torch.cat([value.to(kind), nothing.expand(many)], dim=-1)
    mixed = F.scaled_dot_product_attention(whole_query, whole_key, whole_value, scale=channels**-0.5)
    return mixed[..., :channels]


@cache
def _places(height: int, width: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """Row and column of each token, each as a unit vector (tokens, height + width)."""
    # Made once and kept, as CUDA graphs know its address. It is no buffer, which would count for a backbone's checksum.
    with torch.inference_mode(False):
        rows, columns = (torch.eye(side, dtype=kind, device=device) for side in (height, width))
        return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1)
