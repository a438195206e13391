"""The family of LiteMedSAM and MobileSAM: a small vision transformer with convolutions (TinyViT, arXiv 2207.10666).

LiteMedSAM (bowang-lab/MedSAM) and MobileSAM (arXiv 2306.14289) put it in front of SAM's own prompt encoder and mask decoder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionNeck

from flapsam.sam.architecture import Architecture
from flapsam.sam.autocast import as_autocast
from flapsam.sam.decoder import MaskDecoder
from flapsam.sam.naming import DECODER_FROM_META, NECK_FROM_META, PROJECTIONS, renamed
from flapsam.sam.vit import fused_projection

HEAD = 32
"""Channels of an attention head."""

FROM_META = (
    (r"^image_encoder\.patch_embed\.seq\.0\.", "vision_encoder.stem.0."),
    (r"^image_encoder\.patch_embed\.seq\.2\.", "vision_encoder.stem.1."),
    (r"^image_encoder\.layers\.0\.blocks\.", "vision_encoder.convolutions."),
    (r"^image_encoder\.layers\.(\d)\.downsample\.", r"vision_encoder.merges.\1."),
    *NECK_FROM_META,
    (r"\.c\.weight$", ".conv.weight"),
    (r"\.bn\.", ".norm."),
    (r"\.(attn|mlp)\.norm\.", r".\1.layer_norm."),
    (r"\.attention_biases$", ".biases"),
    (r"\.mlp\.fc([12])\.", r".mlp.lin\1."),
    *DECODER_FROM_META,
)
USELESS = re.compile(r"\.num_batches_tracked$|^image_encoder\.(norm_head|head)\.")
"""Tensors in published checkpoints that the network has no use for: counters, and the head of a classifier."""


@dataclass(frozen=True, kw_only=True)
class TinyVit(Architecture):
    """Convolutions at the images' own, half or a quarter of their resolution, then three stages of attention in windows."""

    widths: tuple[int, int, int, int]
    """Channels of each stage. Stage 0 has convolutions in place of attention."""
    depths: tuple[int, int, int, int]
    windows: tuple[int, int, int]
    """Side of the windows in the stages with attention, in tokens."""
    stem: tuple[int, int, int]
    """Kernel of both convolutions at the beginning, and the stride of each."""
    expansion: int = 4
    """Channels of hidden layers, as a multiple of the stage's width."""

    whose: ClassVar[Mapping[str, str]] = {"meta": "those of MobileSAM and LiteMedSAM", "flapsam": "flapsam's own"}

    def encoder(self, image_size: int) -> "TinyVitEncoder":
        """Build the encoder: (batch, 3, size, size) → (batch, decoder width, tokens, tokens)."""
        self.tokens(image_size)
        return TinyVitEncoder(self)

    def decoder(self, masks: int) -> MaskDecoder:
        """Build SAM's decoder."""
        return MaskDecoder(self, masks)

    def values_a_slice(self, image_size: int) -> int:
        """The hidden layer of the first stage's convolutions."""
        return self.expansion * self.widths[0] * (image_size // (self.stem[1] * self.stem[2])) ** 2

    @classmethod
    def naming_of(cls, state: Mapping[str, Tensor]) -> str | None:
        """The names of MobileSAM, whose decoder has Meta's, or the network's own."""
        if "image_encoder.patch_embed.seq.0.c.weight" in state:
            return "meta"
        return "flapsam" if "vision_encoder.stem.0.conv.weight" in state else None

    @classmethod
    def to_own_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors, number the blocks of all stages consecutively, and split each fused qkv head by head."""
        if cls.naming_of(state) == "flapsam":
            return dict(state)
        block = re.compile(r"^image_encoder\.layers\.([1-3])\.blocks\.(\d+)\.")
        found = {(int(m[1]), int(m[2])) for name in state if (m := block.match(name))}
        numbers = {place: number for number, place in enumerate(sorted(found))}
        result: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if not USELESS.search(name):
                numbered = block.sub(lambda m: f"vision_encoder.layers.{numbers[int(m[1]), int(m[2])]}.", name)
                result[numbered] = tensor
        return _split_by_head(renamed(result, FROM_META))

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Compare the stages' widths, the number of blocks, the stem's kernel and the decoder's width."""
        kernel = state["vision_encoder.stem.0.conv.weight"].shape[-1]
        widths = (
            len(state["vision_encoder.stem.1.conv.weight"]),
            *(len(state[f"vision_encoder.merges.{stage}.conv1.conv.weight"]) for stage in range(3)),
        )
        blocks = sum(name.endswith(".attn.biases") for name in state)
        width = len(state["vision_encoder.neck.conv1.weight"])
        return (kernel, widths, blocks, width) == (self.stem[0], self.widths, self.depth, self.decoder_width)


def _split_by_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split each fused projection (heads · [query, key, value] · channels of a head, …) in three."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, fused, last = name.partition(".attn.qkv.")
        if fused:
            heads = len(state[f"{block}.attn.biases"])
            for part, rows in zip(PROJECTIONS, tensor.unflatten(0, (heads, 3, -1)).unbind(1), strict=True):
                result[f"{block}.attn.{part}.{last}"] = rows.flatten(0, 1)
        else:
            result[name] = tensor
    return result


class TinyVitEncoder(nn.Module):
    """TinyViT with SAM's neck."""

    def __init__(self, sizes: TinyVit) -> None:
        super().__init__()
        kernel, *strides = sizes.stem
        narrow, *wider = sizes.widths
        pairs = list(zip(sizes.widths, wider, strict=False))
        stem = zip((3, narrow // 2), (narrow // 2, narrow), strides, strict=True)
        self.stem = nn.Sequential(*(ConvNorm(width_in, width, kernel, stride) for width_in, width, stride in stem))
        self.convolutions = nn.ModuleList(InvertedBottleneck(narrow, sizes.expansion) for _ in range(sizes.depths[0]))
        # The last stage has the resolution of the one before it.
        self.merges = nn.ModuleList(
            Merge(width, wide, stride) for (width, wide), stride in zip(pairs, (2, 2, 1), strict=True)
        )
        self.layers = nn.ModuleList(
            Block(width, window, sizes.expansion)
            for width, window, depth in zip(wider, sizes.windows, sizes.depths[1:], strict=True)
            for _ in range(depth)
        )
        self.stages = [sum(sizes.depths[1:stage]) for stage in range(1, 5)]
        self.neck = SamVisionNeck(SamVisionConfig(hidden_size=sizes.widths[-1], output_channels=sizes.decoder_width))

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (batch, 3, size, size) as (batch, decoder width, tokens, tokens)."""
        first, second = self.stem
        # With channels last, blocks need no copies between convolutions and attention, and most convolutions are faster.
        grid = second(_gelu(first(images.contiguous(memory_format=torch.channels_last))))
        for block in self.convolutions:
            grid = block(grid)
        for merge, start, end in zip(self.merges, self.stages, self.stages[1:], strict=False):
            grid = merge(grid)
            for block in self.layers[start:end]:
                grid = block(grid)
        return self.neck(grid.permute(0, 2, 3, 1))

    def fuse(self) -> None:
        """Fold every norm into its convolution for good, and compute query, key and value in one product."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        for layer in self.layers:
            switched: Any = layer
            switched.attn = FusedWindowAttention(switched.attn)


class ConvNorm(nn.Module):
    """A convolution without bias and a batch norm with the statistics of its training, computed as one convolution.

    The statistics do not change while the network is fine-tuned, whatever mode it is in, so the norm only scales and shifts
    every channel. The scale is multiplied into the kernel, which is far smaller than the image. Only pretraining from
    scratch sets ``learns_statistics``.
    """

    learns_statistics = False
    """Whether, in training mode, the norm uses each batch's own statistics and remembers their running mean."""

    def __init__(self, width_in: int, width: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False) -> None:
        super().__init__()
        groups = width if depthwise else 1
        self.conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm: Norm | None = Norm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve (batch, channels, height, width) and normalise."""
        conv = self.conv
        if self.norm is None:
            return conv(images)
        if self.learns_statistics and self.training:
            norm = self.norm
            return F.batch_norm(conv(images), norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)
        scale, shift = self.norm.scale_and_shift()
        kernel = conv.weight * scale[:, None, None, None]
        return F.conv2d(images, kernel, shift, conv.stride, conv.padding, conv.dilation, conv.groups)

    def fold(self) -> None:
        """Keep the kernel multiplied by the scale, for a network whose weights do not change any more."""
        if self.norm is not None:
            scale, shift = self.norm.scale_and_shift()
            self.conv.weight = nn.Parameter(self.conv.weight * scale[:, None, None, None], requires_grad=False)
            self.conv.bias = nn.Parameter(shift.detach(), requires_grad=False)
            self.norm = None


class Norm(nn.Module):
    """A batch norm whose statistics stay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What every channel is multiplied by, and what is added then. Epsilon is PyTorch's, as for published weights."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale


class InvertedBottleneck(nn.Module):
    """Three convolutions with a wide depthwise one in the middle, added to the input (MBConv, arXiv 1801.04381)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        wide = width * expansion
        self.conv1 = ConvNorm(width, wide)
        self.conv2 = ConvNorm(wide, wide, kernel=3, depthwise=True)
        self.conv3 = ConvNorm(wide, width)

    def forward(self, images: Tensor) -> Tensor:
        """Transform (batch, channels, height, width)."""
        return _gelu(images + self.conv3(_gelu(self.conv2(_gelu(self.conv1(images))))))


class Merge(nn.Module):
    """Convolutions from one stage to the next, which halve the resolution if their stride is 2."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width_in, width)
        self.conv2 = ConvNorm(width, width, kernel=3, stride=stride, depthwise=True)
        self.conv3 = ConvNorm(width, width)

    def forward(self, images: Tensor) -> Tensor:
        """Transform (batch, channels, height, width)."""
        return self.conv3(_gelu(self.conv2(_gelu(self.conv1(images)))))


class Block(GradientCheckpointingLayer):
    """Attention within windows, a small convolution across them, and an MLP."""

    def __init__(self, width: int, window: int, expansion: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, window)
        self.local_conv = ConvNorm(width, width, kernel=3, depthwise=True)
        self.mlp = NormedMlp(width, width * expansion)

    def forward(self, grid: Tensor) -> Tensor:
        """Transform (batch, channels, height, width)."""
        rows = grid.permute(0, 2, 3, 1)
        rows = rows + self._attend(rows)
        rows = self.local_conv(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (rows + self.mlp(rows)).permute(0, 3, 1, 2)

    def _attend(self, rows: Tensor) -> Tensor:
        """Cut (batch, height, width, channels) into windows, padded with zeros below and to the right, which take part."""
        batch, height, width, channels = rows.shape
        side = self.window
        padded = F.pad(rows, (0, 0, 0, -width % side, 0, -height % side))
        down, across = padded.shape[1] // side, padded.shape[2] // side
        windows = padded.view(batch, down, side, across, side, channels).transpose(2, 3)
        mixed = self.attn(windows.reshape(-1, side * side, channels))
        whole = mixed.view(batch, down, across, side, side, channels).transpose(2, 3)
        return whole.reshape(padded.shape)[:, :height, :width]


class NormedMlp(nn.Module):
    """A layer norm and two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, rows: Tensor) -> Tensor:
        """Transform the last dimension."""
        return self.lin2(_gelu(self.lin1(self.layer_norm(rows))))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a bias that depends on the distance between rows and columns."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.layer_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.biases = nn.Parameter(torch.zeros(self.heads, window * window))
        self.distance: Tensor
        self.register_buffer("distance", _distances(window), persistent=False)

    def forward(self, windows: Tensor) -> Tensor:
        """Attend over tokens (windows, tokens, channels)."""
        normed = as_autocast(self.layer_norm(windows))
        query, key, value = (
            projection(normed).unflatten(2, (self.heads, HEAD)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.biases[None, :, self.distance])
        return self.proj(mixed.transpose(1, 2).flatten(2))


class FusedWindowAttention(nn.Module):
    """``WindowAttention`` with one product for query, key and value, and with biases looked up beforehand."""

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.layer_norm = attention.layer_norm
        self.qkv = fused_projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.proj = attention.proj
        self.bias: Tensor
        self.register_buffer("bias", attention.biases[None, :, attention.distance].detach())

    def forward(self, windows: Tensor) -> Tensor:
        """Attend over tokens (windows, tokens, channels)."""
        query, key, value = self.qkv(self.layer_norm(windows)).unflatten(2, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def _gelu(values: Tensor) -> Tensor:
    """GELU of a result that nothing else needs: in place unless it has a gradient, since new memory costs more than GELU."""
    return F.gelu(values) if values.requires_grad else torch.ops.aten.gelu_(values)


def _distances(window: int) -> Tensor:
    """The number of the bias for each pair of a window's tokens (tokens, tokens).

    Distances (rows, columns) are numbered in the order in which the pairs of tokens first show them. The pairs of the first
    token show all of them, in reading order.
    """
    places = torch.arange(window * window)
    rows, columns = places // window, places % window
    return (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
