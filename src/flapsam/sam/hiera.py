"""The family of SAM 2.1: a hierarchical vision transformer and a decoder that sees finer features (arXiv 2408.00714)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flapsam.sam.architecture import Architecture
from flapsam.sam.autocast import as_autocast
from flapsam.sam.decoder import MaskDecoder, Mlp
from flapsam.sam.naming import (
    DECODER_FROM_META,
    DECODER_IN_TRANSFORMERS,
    Rules,
    from_transformers,
    renamed,
    split_thirds,
    to_transformers,
)
from flapsam.sam.vit import fused_projection

if TYPE_CHECKING:
    from transformers.models.sam2.configuration_sam2 import Sam2VisionConfig

    from flapsam.sam.network import Sam

FROM_META = (
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.stem.projection."),
    (r"^image_encoder\.trunk\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.trunk\.", "vision_encoder."),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^no_mem_embed$", "vision_encoder.no_memory_embedding"),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.conv_s", "vision_encoder.conv_s"),
    (r"^sam_mask_decoder\.obj_score_token\.", "mask_decoder.object_score_token."),
    (r"^sam_mask_decoder\.pred_obj_score_head\.", "mask_decoder.object_score_head."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^(vision_encoder\.layers\.\d+\.mlp)\.layers\.0\.", r"\1.proj_in."),
    (r"^(vision_encoder\.layers\.\d+\.mlp)\.layers\.1\.", r"\1.proj_out."),
    (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.layers\.0\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.layers\.1\.", r"\1.lin2."),
    *DECODER_FROM_META,
)
IN_TRANSFORMERS: Rules = (
    ("vision_encoder.backbone.patch_embed.", "vision_encoder.stem."),
    ("vision_encoder.backbone.blocks.", "vision_encoder.layers."),
    ("vision_encoder.backbone.pos_embed", "vision_encoder.pos_embed"),
    ("no_memory_embedding", "vision_encoder.no_memory_embedding"),
    ("mask_decoder.conv_s", "vision_encoder.conv_s"),
    ("mask_decoder.obj_score_token.", "mask_decoder.object_score_token."),
    ("mask_decoder.pred_obj_score_head.", "mask_decoder.object_score_head."),
    ("mask_decoder.transformer.layers.{block}.mlp.proj_in.", "mask_decoder.transformer.layers.{block}.mlp.lin1."),
    ("mask_decoder.transformer.layers.{block}.mlp.proj_out.", "mask_decoder.transformer.layers.{block}.mlp.lin2."),
    ("mask_decoder.transformer.{attention}.o_proj.", "mask_decoder.transformer.{attention}.out_proj."),
    *DECODER_IN_TRANSFORMERS,
)
"""Beginnings of names in transformers → those in the network, as in ``DECODER_IN_TRANSFORMERS``."""

FROM_TRANSFORMERS = from_transformers(IN_TRANSFORMERS)
POINTS = "prompt_encoder.point_embed"
STILL = re.compile(r"^(vision_encoder|prompt_encoder|mask_decoder)\.")
"""Names, in the network's own scheme, of tensors that still images need. The others are for video."""


@dataclass(frozen=True, kw_only=True)
class Hiera(Architecture):
    """Four stages of attention, each with half the resolution and twice the width and heads of the one before."""

    width: int
    """Channels of the first stage."""
    heads: int
    """Heads of the first stage."""
    depths: tuple[int, int, int, int]
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    """Side of the windows in each stage, in tokens."""
    global_blocks: tuple[int, ...]
    """Blocks that attend over the whole image."""
    positions: int = 7
    """Side of the grid of position embeddings, which is interpolated to the image's size."""
    patch: tuple[int, int] = (7, 4)
    """Kernel and stride of the convolution that makes tokens of pixels."""
    upscaling: tuple[int, ...] = (64, 32)

    whose: ClassVar[Mapping[str, str]] = {
        "meta": "Meta's",
        "transformers": "those of transformers",
        "flapsam": "flapsam's own",
    }
    boxes_end_with_padding: ClassVar[bool] = True

    @property
    def multiple(self) -> int:
        """The last stage has half the embedding's resolution, and the first stage has whole windows."""
        return lcm(2 * self.stride, self.windows[0] * self.patch[1])

    def config(self) -> "Sam2VisionConfig":
        """The encoder in the terms of transformers."""
        # Imported here, because few runs need it and it takes a while.
        from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig, Sam2VisionConfig

        widths = [self.width * 2**stage for stage in range(4)]
        hiera = Sam2HieraDetConfig(
            hidden_size=self.width,
            num_attention_heads=self.heads,
            blocks_per_stage=list(self.depths),
            embed_dim_per_stage=widths,
            num_attention_heads_per_stage=[self.heads * 2**stage for stage in range(4)],
            window_size_per_stage=list(self.windows),
            global_attention_blocks=list(self.global_blocks),
            window_positional_embedding_background_size=[self.positions, self.positions],
            patch_kernel_size=[self.patch[0]] * 2,
            patch_stride=[self.patch[1]] * 2,
            patch_padding=[self.patch[0] // 2] * 2,
        )
        return Sam2VisionConfig(
            backbone_config=hiera, backbone_channel_list=widths[::-1], fpn_hidden_size=self.decoder_width
        )

    def encoder(self, image_size: int) -> "HieraEncoder":
        """Build the encoder: (batch, 3, size, size) → (batch, 4 · decoder width, tokens, tokens)."""
        self.tokens(image_size)
        return HieraEncoder(self, image_size)

    def decoder(self, masks: int) -> "HieraDecoder":
        """Build SAM 2.1's decoder."""
        return HieraDecoder(self, masks)

    def values_a_slice(self, image_size: int) -> int:
        """The hidden layer of the first stage's MLP, or the scores of a global block."""
        tokens = (image_size // self.stride) ** 2
        return max(4 * self.width * (image_size // self.patch[1]) ** 2, 4 * self.heads * tokens**2)

    @classmethod
    def naming_of(cls, state: Mapping[str, Tensor]) -> str | None:
        """Meta's names, those of ``Sam2Model``, or the network's own."""
        marks = {
            "meta": "image_encoder.trunk.patch_embed.proj.weight",
            "transformers": "vision_encoder.backbone.patch_embed.projection.weight",
            "flapsam": "vision_encoder.stem.projection.weight",
        }
        return next((naming for naming, mark in marks.items() if mark in state), None)

    @classmethod
    def to_own_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors, split each fused qkv into thirds, and leave out what is for video."""
        rules = {"meta": FROM_META, "transformers": FROM_TRANSFORMERS}.get(cls.naming_of(state) or "flapsam", ())
        result: dict[str, Tensor] = {}
        for name, tensor in split_thirds(renamed(state, rules)).items():
            if name == f"{POINTS}.weight":
                result |= {f"{POINTS}.{kind}.weight": row[None] for kind, row in enumerate(tensor)}
            elif STILL.match(name):
                result[name] = tensor
        return result

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Compare the first stage's width, the number of blocks, the windows and the decoder's width."""
        width = len(state["vision_encoder.stem.projection.weight"])
        blocks = sum(name.endswith(".attn.q_proj.weight") and name.startswith("vision_encoder.") for name in state)
        decoder_width = len(state["vision_encoder.neck.convs.0.weight"])
        sides = [state[f"vision_encoder.{name}"].shape[-1] for name in ("pos_embed", "pos_embed_window")]
        actual = (width, blocks, decoder_width, *sides)
        return actual == (self.width, self.depth, self.decoder_width, self.positions, self.windows[0])

    def to_transformers(self, network: "Sam") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The network for ``Sam2Model.from_pretrained``. Its decoder counts one mask fewer than it has mask tokens."""
        from transformers.models.sam2.configuration_sam2 import (
            Sam2Config,
            Sam2MaskDecoderConfig,
            Sam2PromptEncoderConfig,
        )

        state = network.state_dict()
        vision = self.config()
        vision.backbone_feature_sizes = [
            [network.image_size // part] * 2 for part in (self.stride // 4, self.stride // 2, self.stride)
        ]
        config = Sam2Config(
            vision_config=vision,
            prompt_encoder_config=Sam2PromptEncoderConfig(
                hidden_size=self.decoder_width, image_size=network.image_size, patch_size=self.stride
            ),
            mask_decoder_config=Sam2MaskDecoderConfig(
                hidden_size=self.decoder_width,
                mlp_dim=self.decoder_mlp,
                num_attention_heads=self.decoder_heads,
                num_multimask_outputs=network.masks - 1,
                iou_head_hidden_dim=self.iou_width,
            ),
        ).to_dict()
        points = torch.cat([state.pop(f"{POINTS}.{kind}.weight") for kind in range(4)])
        tensors = to_transformers({**state, f"{POINTS}.weight": points}, IN_TRANSFORMERS)
        return tensors, {**config, "architectures": ["Sam2Model"]}


class HieraEncoder(nn.Module):
    """SAM 2.1's image encoder from transformers, with each fused query-key-value projection split into three layers."""

    def __init__(self, sizes: Hiera, image_size: int) -> None:
        from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleBlock, Sam2PatchEmbeddings

        super().__init__()
        hiera: Any = sizes.config().backbone_config
        self.stem = Sam2PatchEmbeddings(hiera)
        side, window = sizes.positions, sizes.windows[0]
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.width, side, side))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, sizes.width, window, window))
        self.layers = nn.ModuleList()
        self.ends: list[int] = []
        for stage, depth in enumerate(sizes.depths):
            for number in range(depth):
                block: Any = Sam2MultiScaleBlock(hiera, stage, number, len(self.layers))
                block.attn = HieraAttention(block.dim, block.dim_out, sizes.heads * 2**stage, block.query_stride)
                self.layers.append(block)
            self.ends.append(len(self.layers) - 1)
        self.neck = Neck([sizes.width * 2**stage for stage in range(4)], sizes.decoder_width)
        width = sizes.decoder_width
        # Meta's code keeps these two convolutions in the decoder and applies them when it encodes an image.
        self.conv_s0 = nn.Conv2d(width, width // 8, 1)
        self.conv_s1 = nn.Conv2d(width, width // 4, 1)
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.interpolation: Tensor
        self.register_buffer("interpolation", _bicubic(side, image_size // sizes.patch[1]), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images as one tensor (batch, 4 · width, tokens, tokens): the embedding, and finer features in channels."""
        rows = self.stem(images)
        rows = rows + self._positions(rows.shape[1])
        stages = []
        for number, layer in enumerate(self.layers):
            rows = layer(rows)
            if number in self.ends:
                stages.append(rows)
        fine, middle, coarse = self.neck(stages)
        embedding = coarse + self.no_memory_embedding[0, 0, :, None, None]
        finer = (F.pixel_unshuffle(self.conv_s1(middle), 2), F.pixel_unshuffle(self.conv_s0(fine), 4))
        return torch.cat([embedding, *finer], dim=1)

    def _positions(self, side: int) -> Tensor:
        """Position embeddings of the first stage's tokens (1, side, side, channels)."""
        whole = torch.einsum("hi,bcij,wj->bchw", self.interpolation, self.pos_embed, self.interpolation)
        repeats = side // self.pos_embed_window.shape[-1]
        return (whole + self.pos_embed_window.tile(1, 1, repeats, repeats)).permute(0, 2, 3, 1)

    def fuse(self) -> None:
        """Compute query, key and value in one product from now on."""
        for layer in self.layers:
            switched: Any = layer
            switched.attn = FusedHieraAttention(switched.attn)


def _bicubic(old: int, new: int) -> Tensor:
    """Bicubic interpolation of ``old`` values to ``new``, as a matrix (new, old), so that gradients are deterministic."""
    one_hot = torch.eye(old).view(1, old, old, 1)
    return F.interpolate(one_hot, (new, 1), mode="bicubic")[0, :, :, 0].T.contiguous()


class Neck(nn.Module):
    """The feature pyramid: every stage in the decoder's width. The last stage is added to the one before it."""

    def __init__(self, widths: list[int], width: int) -> None:
        super().__init__()
        # As in Meta's code, the first convolution belongs to the last stage.
        self.convs = nn.ModuleList(nn.Conv2d(stage, width, 1) for stage in reversed(widths))

    def forward(self, stages: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Features (batch, width, height, width) of the first three of four stages (batch, height, width, channels)."""
        last, coarse, middle, fine = (
            conv(stage.permute(0, 3, 1, 2)) for conv, stage in zip(self.convs, reversed(stages), strict=True)
        )
        return fine, middle, coarse + F.interpolate(last, scale_factor=2.0, mode="nearest")


class HieraAttention(nn.Module):
    """Multi-head self-attention within a window, whose queries are pooled where a stage begins."""

    def __init__(self, width_in: int, width: int, heads: int, stride: list[int] | None) -> None:
        super().__init__()
        self.heads = heads
        self.stride = stride
        self.q_proj = nn.Linear(width_in, width)
        self.k_proj = nn.Linear(width_in, width)
        self.v_proj = nn.Linear(width_in, width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend over tokens (batch, height, width, channels)."""
        tokens = as_autocast(hidden_states)
        query, key, value = (layer(tokens) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.proj(_attend(query, key, value, self.heads, self.stride))


class FusedHieraAttention(nn.Module):
    """``HieraAttention`` with one product for query, key and value."""

    def __init__(self, attention: HieraAttention) -> None:
        super().__init__()
        self.heads, self.stride = attention.heads, attention.stride
        self.qkv = fused_projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.proj = attention.proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend over tokens (batch, height, width, channels)."""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        return self.proj(_attend(query, key, value, self.heads, self.stride))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, stride: list[int] | None) -> Tensor:
    """Attention over all tokens (batch, height, width, channels) of a window, with pooled queries if there is a stride."""
    pooled = query if stride is None else F.max_pool2d(query.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1)
    query, key, value = (part.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2) for part in (pooled, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(pooled.shape)


class HieraDecoder(MaskDecoder):
    """SAM's decoder with a further token, which scores whether there is an object, and finer features of the image."""

    def __init__(self, sizes: Hiera, masks: int) -> None:
        super().__init__(sizes, masks)
        self.width = sizes.decoder_width
        self.object_score_token = nn.Embedding(1, self.width)
        self.object_score_head = Mlp(self.width, self.width, 1)

    def forward(
        self, embedding: Tensor, positions: Tensor, prompt: Tensor, points: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode as ``MaskDecoder`` does. The embedding has the finer features in further channels."""
        queries, masks = self.decode(embedding, positions, prompt, points)
        return masks, self.iou_prediction_head(queries[:, 1]).sigmoid()

    def object_score(self, embedding: Tensor, positions: Tensor, prompt: Tensor, points: Tensor | None = None) -> Tensor:
        """The logit (batch, 1) of whether the prompt means an object."""
        return self.object_score_head(self.decode(embedding, positions, prompt, points)[0][:, 0])

    def decode(self, embedding: Tensor, positions: Tensor, prompt: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """The transformed tokens: object score, IoU, masks, points. And the masks' logits."""
        width = self.width
        grid, middle, fine = embedding.split([width, width, 2 * width], dim=1)
        tokens = torch.cat([self.object_score_token.weight, self.iou_token.weight, self.output.mask_tokens.weight])
        queries, grid = self.transform(tokens, grid + prompt, positions, points)
        finer = (F.pixel_shuffle(middle, 2), F.pixel_shuffle(fine, 4))
        return queries, self.output(queries[:, 2 : 2 + self.masks], grid, finer)
