"""Checkpoints in Meta's names → the network's names and sizes."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flapsam.errors import FlapsamError
from flapsam.sam.architecture import Architecture
from flapsam.sam.network import Sam

RENAMED: tuple[tuple[str, str], ...] = (
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
"""Meta's names → the network's, applied in order."""

NEW_IN_FLAPSAM = re.compile(
    r"^mask_decoder\.(iou_prediction_head|output\.mask_tokens|output\.hypernetworks|output\.upscaling\.(?![013]\.))"
)
"""What means something else in SAM than here, and starts afresh."""


@dataclass
class LoadReport:
    """What became of a checkpoint's tensors."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    """In the network but not taken from the checkpoint."""

    def __str__(self) -> str:
        return f"{len(self.loaded)} tensors loaded, {len(self.resized)} of them resized, {len(self.new)} new"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a state dictionary from safetensors, or from a ``.pth`` that holds nothing but tensors.

    Raises:
        FlapsamError: the file is missing, truncated, or would run code on loading.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FlapsamError(f"{path}: no such checkpoint") from error
    except pickle.UnpicklingError as error:
        raise FlapsamError(f"{path}: holds more than tensors and is not opened; give a plain state dictionary") from error
    except (SafetensorError, BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise FlapsamError(f"{path}: not a readable checkpoint; is it truncated?") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FlapsamError(f"{path}: not a state dictionary; give one that maps names to tensors")
    return state


def load_meta(network: Sam, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Load a checkpoint in Meta's names into a network without adapters.

    Of a SAM checkpoint everything that fits is taken but the mask tokens, the hypernetworks and the IoU head; of the
    upscaling, keys 0, 1 and 3. A checkpoint whose decoder is already flapsam's (upscaling of 16×) is taken whole.

    Raises:
        FlapsamError: the tensors are another model's, or of another size; ``source`` names the checkpoint.
    """
    whole = "mask_decoder.output_upscaling.9.weight" in state
    renamed = from_meta(state)
    if not whole:
        renamed = {name: tensor for name, tensor in renamed.items() if not NEW_IN_FLAPSAM.match(name)}
    target = network.state_dict()
    fitted = resize_positions(renamed, network.sizes, network.image_size)
    report = LoadReport()
    for name, wanted in target.items():
        given = fitted.get(name)
        if given is None:
            if whole or not NEW_IN_FLAPSAM.match(name):
                raise FlapsamError(f"{source}: {name} is missing; this is not a SAM checkpoint")
            report.new.append(name)
        elif given.shape != wanted.shape:
            raise FlapsamError(
                f"{source}: {name} has shape {tuple(given.shape)}, this backbone wants {tuple(wanted.shape)}; "
                "choose the backbone.name that the checkpoint was made for"
            )
        else:
            report.loaded.append(name)
            if given is not renamed[name]:
                report.resized.append(name)
    network.load_state_dict({name: fitted[name] for name in report.loaded}, strict=False)
    return report


def from_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors, and split each fused qkv into its three projections."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, third in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                result[name.replace("qkv", part)] = third
        else:
            result[name] = tensor
    return result


def resize_positions(state: Mapping[str, Tensor], sizes: Architecture, image_size: int) -> dict[str, Tensor]:
    """Resize position embeddings, bilinearly, to another image size.

    ``pos_embed`` goes to the new grid; ``rel_pos_h`` and ``rel_pos_w`` of the global blocks to 2·tokens − 1 rows, while
    windowed blocks keep theirs.
    """
    tokens = sizes.tokens(image_size)
    rows = 2 * tokens - 1
    result = dict(state)
    for name, tensor in state.items():
        if name == "vision_encoder.pos_embed" and tensor.shape[1:3] != (tokens, tokens):
            grid = F.interpolate(tensor.float().permute(0, 3, 1, 2), (tokens, tokens), mode="bilinear")
            result[name] = grid.permute(0, 2, 3, 1)
        block = re.match(r"vision_encoder\.layers\.(\d+)\.attn\.rel_pos_[hw]$", name)
        if block and int(block[1]) in sizes.global_blocks and len(tensor) != rows:
            # As an image of one channel, whose width, the head's channels, stays.
            result[name] = F.interpolate(tensor.float()[None, None], (rows, tensor.shape[1]), mode="bilinear")[0, 0]
    return result
