"""The names of the tensors that all families share: prompt encoder and mask decoder.

Meta and transformers name them differently. The network's own names are those of transformers for the most part.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]
"""Patterns in names → their replacements, applied in order."""

DECODER_FROM_META: Rules = (
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
NECK_FROM_META: Rules = (
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
)
DECODER_IN_TRANSFORMERS: Rules = (
    ("mask_decoder.mask_tokens.", "mask_decoder.output.mask_tokens."),
    ("mask_decoder.upscale_conv1.", "mask_decoder.output.upscaling.0."),
    ("mask_decoder.upscale_layer_norm.", "mask_decoder.output.upscaling.1."),
    ("mask_decoder.upscale_conv2.", "mask_decoder.output.upscaling.3."),
    ("mask_decoder.output_hypernetworks_mlps.", "mask_decoder.output.hypernetworks."),
    ("mask_decoder.{mlp}.layers.0.", "mask_decoder.{mlp}.layers.1."),
    ("mask_decoder.{mlp}.proj_in.", "mask_decoder.{mlp}.layers.0."),
    ("mask_decoder.{mlp}.proj_out.", "mask_decoder.{mlp}.layers.2."),
)
"""Beginnings of names in transformers → those in the network. ``PLACEHOLDERS`` says what the words in braces stand for."""

PLACEHOLDERS = {
    "{mlp}": r"(output\.hypernetworks\.\d+|\w+_head)",
    "{block}": r"(\d+)",
    "{attention}": r"(layers\.\d+\.\w+|final_attn_token_to_image)",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ENCODER_PROJECTION = re.compile(r"^vision_encoder\..*\.[qkv]_proj\.")
OWN = "flapsam."
"""Prefix of tensors that SAM does not have, in a file that otherwise has the names of transformers."""


def renamed(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply all rules to all names. Names with the prefix ``OWN`` only lose it."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name.removeprefix(OWN)
        if own == name:
            for pattern, replacement in rules:
                own = re.sub(pattern, replacement, own)
        result[own] = tensor
    return result


def from_transformers(pairs: Rules) -> Rules:
    """Rules that convert names of transformers to the network's."""
    shared = (r"^shared_image_embedding\.", "prompt_encoder.shared_embedding.")
    return (shared, *(_rule(theirs, own) for theirs, own in pairs))


def _rule(old: str, new: str) -> tuple[str, str]:
    pattern = "^" + re.escape(old).replace(r"\{", "{").replace(r"\}", "}")
    for word, meaning in PLACEHOLDERS.items():
        pattern, new = pattern.replace(word, meaning), new.replace(word, r"\1")
    return pattern, new


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


def to_transformers(state: Mapping[str, Tensor], pairs: Rules = DECODER_IN_TRANSFORMERS) -> dict[str, Tensor]:
    """Convert the network's names to those of transformers, and fuse the encoder's query, key and value.

    Tensors that SAM does not have keep their names, with ``OWN`` in front. These are the hypernetworks if they are narrower
    here, and the last two upsampling steps, or all four if the first two are not as wide as SAM's.

    Args:
        state: the tensors in the network's names.
        pairs: beginnings of names in transformers and in the network, in the order in which they convert to the network's.
    """
    width = state["mask_decoder.output.mask_tokens.weight"].shape[1]
    own = re.compile(r"\.output\.upscaling\.[4-9]")
    if state["mask_decoder.output.upscaling.3.weight"].shape[:2] != (width // 4, width // 8):
        own = re.compile(r"\.output\.(hypernetworks|upscaling)\.")
    elif len(state["mask_decoder.output.hypernetworks.0.layers.2.weight"]) != width // 8:
        own = re.compile(r"\.output\.(hypernetworks\.|upscaling\.[4-9])")
    rules = [_rule(ours, theirs) for theirs, ours in reversed(pairs)]
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if own.search(name):
            result[OWN + name] = tensor
        elif not ENCODER_PROJECTION.match(name):
            result |= renamed({name: tensor}, rules)
        elif ".q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in PROJECTIONS]
            result |= renamed({name.replace("q_proj", "qkv"): torch.cat(parts)}, rules)
    positions = "prompt_encoder.shared_embedding.positional_embedding"
    return result | {"shared_image_embedding.positional_embedding": result[positions].clone()}
