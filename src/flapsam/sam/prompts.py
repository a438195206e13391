"""Prompts: a box or points in, one mask out, to prove that a checkpoint is the model that it is said to be.

Runs never use prompts. These functions serve the Python API, ``flapsam backbone info --check`` and the tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.sam.architecture import Architecture
from flapsam.sam.checkpoints import load_checkpoint
from flapsam.sam.families import architecture, infer_architecture, to_own_names
from flapsam.sam.network import Sam, build

MASKS = 4
"""Number of masks of a published SAM: one for a clear prompt, and three for one that may mean a whole or its parts."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""
Point = tuple[float, float, bool]
"""Column and row in pixels, and whether the point lies in the structure."""


def with_prompts(state: Mapping[str, Tensor], source: str, *, pixels: str = "paper", image_size: int | None = None) -> Sam:
    """Build the network of a published checkpoint, with its own four masks.

    Args:
        state: the tensors that ``read_checkpoint`` returns.
        source: the checkpoint's name in error messages.
        pixels: name of the input normalisation in ``PIXELS`` that the checkpoint was trained with.
        image_size: side of the input in pixels; that of the checkpoint's training if None.

    Raises:
        FlapsamError: the checkpoint has an unknown size, was trained without prompts, or has more tensors than a SAM.
    """
    name, named = infer_architecture(state), to_own_names(state)
    if name is None:
        raise FlapsamError(f"{source}: a SAM of unknown size, which cannot be prompted")
    if len(named.get("mask_decoder.output.mask_tokens.weight", ())) != MASKS:
        raise FlapsamError(f"{source}: {name} was trained without prompts, so it cannot be prompted")
    sizes = published_form(architecture(name))
    size = image_size or sizes.trained_size(named) or sizes.native_size
    network = build(sizes, image_size=size, classes=MASKS - 1, pixels=pixels)
    report = load_checkpoint(network, state, source, keep_masks=True)
    if report.unused:
        raise FlapsamError(
            f"{source}: not a plain {name}, because it also has the tensor {report.unused[0]}; it cannot be prompted here"
        )
    return network.eval()


def published_form(sizes: Architecture) -> Architecture:
    """The sizes with SAM's own two upsampling steps."""
    return replace(sizes, upscaling=(sizes.decoder_width // 4, sizes.decoder_width // 8))


def embed_prompts(network: Sam, *, box: Box | None = None, points: Sequence[Point] = ()) -> Tensor:
    """Embed a box and points, in pixels of the network's input, as tokens (1, tokens, width)."""
    places = [(column, row, int(inside)) for column, row, inside in points]
    tokens = [_token(network, column, row, kind) for column, row, kind in places]
    if box is not None:
        left, top, right, bottom = box
        tokens += [_token(network, left, top, 2), _token(network, right, bottom, 3)]
    if box is None or network.sizes.boxes_end_with_padding:
        tokens.append(network.prompt_encoder.not_a_point_embed.weight[0])
    return torch.stack(tokens)[None]


def _token(network: Sam, column: float, row: float, kind: int) -> Tensor:
    """The token (width) of a pixel's centre. Its kind is 0 outside, 1 inside, 2 a box's first and 3 its second corner."""
    encoder: Any = network.prompt_encoder
    place = (torch.tensor([column, row], device=network.pixel_mean.device) + 0.5) / network.image_size
    return encoder.shared_embedding(place[None])[0] + encoder.point_embed[kind].weight[0]


@torch.inference_mode()
def prompted_masks(network: Sam, images: Tensor, *, box: Box | None = None, points: Sequence[Point] = ()) -> Tensor:
    """The logits of all four masks for images (batch, 3, size, size) in [0, 1], at four times the embedding's resolution.

    The first mask is the one for a clear prompt. Coordinates are in pixels of these images.
    """
    prompt = network.prompt_encoder.no_mask_embed.weight[:, :, None, None]
    tokens = embed_prompts(network, box=box, points=points)
    return network.mask_decoder(network.embed(images), network.positions(), prompt, tokens)[0]


@torch.inference_mode()
def mask_in(network: Sam, image: Tensor, *, box: Box | None = None, points: Sequence[Point] = ()) -> Tensor:
    """Segment what a box and points mean in an image of any size.

    The longer side is resized to the network's input, and the rest is padded below or to the right.

    Args:
        network: a network from ``with_prompts``.
        image: an image (3, height, width) in [0, 1].
        box: a box in pixels of the image.
        points: points in pixels of the image.

    Returns:
        The mask (height, width), true within the structure.
    """
    size, (height, width) = network.image_size, image.shape[1:]
    scale = size / max(height, width)
    inner = (max(round(height * scale), 1), max(round(width * scale), 1))
    resized = F.interpolate(image[None], inner, mode="bilinear", antialias=True)
    # The padding is zero after normalisation, as in the code of SAM. That of SAM 2 stretches images instead.
    whole = network.pixel_mean.expand(1, 3, size, size).clone()
    whole[:, :, : inner[0], : inner[1]] = resized
    scaled = None if box is None else (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
    places = [(column * scale, row * scale, inside) for column, row, inside in points]
    logits = prompted_masks(network, whole, box=scaled, points=places)[:, :1]
    logits = F.interpolate(logits, (size, size), mode="bilinear")[:, :, : inner[0], : inner[1]]
    return F.interpolate(logits, (height, width), mode="bilinear")[0, 0] > 0
