"""The names of the tensors that all families share: prompt encoder and mask decoder.

Meta and transformers name them differently. The network's own names are those of transformers for the most part.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

DECODER_FROM_META = (
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
DECODER_FROM_TRANSFORMERS = (
    (r"^shared_image_embedding\.", "prompt_encoder.shared_embedding."),
    (r"\.mask_tokens\.", ".output.mask_tokens."),
    (r"\.upscale_conv1\.", ".output.upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output.upscaling.1."),
    (r"\.upscale_conv2\.", ".output.upscaling.3."),
    (r"\.output_hypernetworks_mlps\.", ".output.hypernetworks."),
    (r"(hypernetworks\.\d+|_head)\.layers\.0\.((?:weight|bias)$)", r"\1.layers.1.\2"),
    (r"(hypernetworks\.\d+|_head)\.proj_in\.", r"\1.layers.0."),
    (r"(hypernetworks\.\d+|_head)\.proj_out\.", r"\1.layers.2."),
)
DECODER_TO_TRANSFORMERS = (
    (r"\.output\.mask_tokens\.", ".mask_tokens."),
    (r"\.output\.upscaling\.0\.", ".upscale_conv1."),
    (r"\.output\.upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output\.upscaling\.3\.", ".upscale_conv2."),
    (r"\.output\.hypernetworks\.", ".output_hypernetworks_mlps."),
    (r"(mlps\.\d+|_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d+|_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d+|_head)\.layers\.2\.", r"\1.proj_out."),
)
"""Patterns in names → their replacements, applied in order."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ENCODER_PROJECTION = re.compile(r"^vision_encoder\..*\.[qkv]_proj\.")
OWN = "flapsam."
"""Prefix of tensors that SAM does not have, in a file that otherwise has the names of transformers."""


def renamed(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply all rules to all names. Names with the prefix ``OWN`` only lose it."""
    rules = tuple(rules)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name.removeprefix(OWN)
        if own == name:
            for pattern, replacement in rules:
                own = re.sub(pattern, replacement, own)
        result[own] = tensor
    return result


def split_thirds(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split each fused projection of the encoder, in which query, key and value lie one after the other, in three."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            thirds = zip(PROJECTIONS, tensor.chunk(3), strict=True)
            result |= {name.replace("qkv", projection): third for projection, third in thirds}
        else:
            result[name] = tensor
    return result


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the decoder and the prompt encoder to the names of transformers, and fuse the encoder's qkv.

    Tensors that SAM does not have keep their names, with ``OWN`` in front. These are the hypernetworks if they are narrower
    here, and the last two upsampling steps, or all four if the first two are not as wide as SAM's.
    """
    width = state["mask_decoder.output.mask_tokens.weight"].shape[1]
    own = re.compile(r"\.output\.upscaling\.[4-9]")
    if state["mask_decoder.output.upscaling.3.weight"].shape[:2] != (width // 4, width // 8):
        own = re.compile(r"\.output\.(hypernetworks|upscaling)\.")
    elif len(state["mask_decoder.output.hypernetworks.0.layers.2.weight"]) != width // 8:
        own = re.compile(r"\.output\.(hypernetworks\.|upscaling\.[4-9])")
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if own.search(name):
            result[OWN + name] = tensor
        elif ENCODER_PROJECTION.match(name):
            if ".q_proj." in name:
                parts = [state[name.replace("q_proj", part)] for part in PROJECTIONS]
                result[name.replace("q_proj", "qkv")] = torch.cat(parts)
        else:
            result |= renamed({name: tensor}, DECODER_TO_TRANSFORMERS)
    positions = "prompt_encoder.shared_embedding.positional_embedding"
    return result | {"shared_image_embedding.positional_embedding": result[positions].clone()}
