"""The names of a SAM's tensors, converted between Meta's, those of transformers and the network's own."""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Naming = Literal["meta", "transformers", "flapsam"]

FROM_META: tuple[tuple[str, str], ...] = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.blocks\.(\d+)\.", r".layers.\1."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.norm([1-4])\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.mask_tokens\.", ".output.mask_tokens."),
    (r"\.output_upscaling\.", ".output.upscaling."),
    (r"\.output_hypernetworks_mlps\.", ".output.hypernetworks."),
)
FROM_TRANSFORMERS: tuple[tuple[str, str], ...] = (
    (r"^shared_image_embedding\.", "prompt_encoder.shared_embedding."),
    (r"\.mask_tokens\.", ".output.mask_tokens."),
    (r"\.upscale_conv1\.", ".output.upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output.upscaling.1."),
    (r"\.upscale_conv2\.", ".output.upscaling.3."),
    (r"\.output_hypernetworks_mlps\.", ".output.hypernetworks."),
    (r"\.layers\.0\.((?:weight|bias)$)", r".layers.1.\1"),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
)
"""Patterns in others' names → the network's names, applied in order."""

OWN = "flapsam."
"""Prefix of tensors that SAM does not have, in a file that otherwise has the names of transformers."""


def naming_of(state: Mapping[str, Tensor]) -> Naming | None:
    """The naming scheme of a state dictionary; None if it is not a SAM's."""
    if any(name.startswith("image_encoder.patch_embed.") for name in state):
        return "meta"
    if any(name.startswith("vision_encoder.patch_embed.") for name in state):
        return "transformers" if any(".qkv." in name for name in state) else "flapsam"
    return None


def to_own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the network's names, and split each fused qkv into its three projections."""
    rules = {"meta": FROM_META, "transformers": FROM_TRANSFORMERS}.get(naming_of(state) or "meta", ())
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(OWN):
            result[name.removeprefix(OWN)] = tensor
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, third in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                result[name.replace("qkv", part)] = third
        else:
            result[name] = tensor
    return result


TO_TRANSFORMERS: tuple[tuple[str, str], ...] = (
    (r"\.output\.mask_tokens\.", ".mask_tokens."),
    (r"\.output\.upscaling\.0\.", ".upscale_conv1."),
    (r"\.output\.upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output\.upscaling\.3\.", ".upscale_conv2."),
    (r"(\.iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(\.iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(\.iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
)


def to_transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from the network's names to those of transformers, and fuse query, key and value.

    Tensors that SAM does not have keep their names, with ``OWN`` in front. These are the hypernetworks, which are narrower
    here, and the last two upsampling steps, or all four if the first two are not as wide as SAM's.
    """
    width = state["mask_decoder.output.mask_tokens.weight"].shape[1]
    like_sam = state["mask_decoder.output.upscaling.3.weight"].shape[:2] == (width // 4, width // 8)
    own = re.compile(r"\.output\.(hypernetworks\.|upscaling\.%s)" % ("[4-9]" if like_sam else ""))
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if own.search(name):
            result[OWN + name] = tensor
        elif name.startswith("vision_encoder.") and ".q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            result[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif not (name.startswith("vision_encoder.") and re.search(r"\.[kv]_proj\.", name)):
            for pattern, replacement in TO_TRANSFORMERS:
                name = re.sub(pattern, replacement, name)
            result[name] = tensor
    positions = "prompt_encoder.shared_embedding.positional_embedding"
    return result | {"shared_image_embedding.positional_embedding": result[positions].clone()}
