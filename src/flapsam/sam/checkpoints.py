"""Loading checkpoints with any known tensor names and any image size into the network."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flapsam.base.download import cache_folder
from flapsam.base.errors import FlapsamError
from flapsam.run.config import RANDOM, Backbone, Checkpoint
from flapsam.sam.families import family_of, to_own_names
from flapsam.sam.network import Sam
from flapsam.sam.sources import SOURCES

SHIPPED = Path(__file__).parent / "weights"
"""Folder of the weights that ship with flapsam."""

MASKS = re.compile(r"^mask_decoder\.(iou_prediction_head|output\.mask_tokens|output\.hypernetworks)\.")
"""Parts specific to a model's own masks. They mean nothing for other classes, so they start with random weights."""

UPSCALING = re.compile(r"^mask_decoder\.output\.upscaling\.")
"""SAM has two upsampling steps. If the network has more, the others start with random weights."""


@dataclass
class LoadReport:
    """Which tensors were loaded from a checkpoint, and how."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    """Tensors of the network that the checkpoint did not provide."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that the network does not have."""

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded ({len(self.resized)} resized), {len(self.new)} new"
        return f"{text}, {len(self.unused)} of the checkpoint not used" if self.unused else text


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dictionary of a checkpoint.

    Args:
        path: a safetensors file, a ``.pth`` that holds nothing but tensors, or a folder that transformers saved.

    Raises:
        FlapsamError: the checkpoint is missing, truncated or not a SAM's, or could run code when loaded.
    """
    if path.is_dir():
        state = {name: tensor for part in _parts(path) for name, tensor in _read_file(part).items()}
    else:
        state = _read_file(path)
    if family_of(state) is None:
        raise FlapsamError(f"{path}: the tensors are another model's; give a checkpoint of Segment Anything")
    return state


def load_checkpoint(network: Sam, state: Mapping[str, Tensor], source: str, *, keep_masks: bool = False) -> LoadReport:
    """Load a checkpoint, in any known tensor names, into a network without adapters.

    All tensors are loaded except the mask tokens, the hypernetworks and the IoU head. SAM's upscaling provides only the keys
    0, 1 and 3.

    Args:
        network: the network, changed in place.
        state: the tensors that ``read_checkpoint`` returns.
        source: the checkpoint's name in error messages.
        keep_masks: load the masks' own parts, too, for a checkpoint with exactly the network's classes.

    Raises:
        FlapsamError: a tensor is missing or has another shape.
    """
    named = to_own_names(state)
    if not keep_masks:
        named = {name: tensor for name, tensor in named.items() if not MASKS.match(name)}
    fitted = network.sizes.fitted(named, network.image_size)
    report = LoadReport(unused=sorted(fitted.keys() - network.state_dict().keys()))
    for name, current in network.state_dict().items():
        tensor = fitted.get(name)
        if tensor is None:
            if not UPSCALING.match(name) and (keep_masks or not MASKS.match(name)):
                raise FlapsamError(f"{source}: the tensor {name} is missing; give a complete SAM checkpoint")
            report.new.append(name)
        elif tensor.shape != current.shape:
            raise FlapsamError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, this backbone needs {tuple(current.shape)}; "
                "choose the backbone.name that the checkpoint was made for"
            )
        else:
            report.loaded.append(name)
            if tensor is not named[name]:
                report.resized.append(name)
    network.load_state_dict({name: fitted[name] for name in report.loaded}, strict=False)
    return report


@torch.no_grad()
def warm_masks(network: Sam, state: Mapping[str, Tensor]) -> None:
    """Start every mask from the checkpoint's first mask: its token, and the layers of its hypernetwork that fit.

    Where there are four upsampling steps, the last layer of SAM's hypernetworks is four times as wide and does not fit. If
    the checkpoint has no masks, nothing changes.

    Args:
        network: the network, changed in place.
        state: the tensors that ``read_checkpoint`` returns.
    """
    named = to_own_names(state)
    output = network.mask_decoder.output
    token = named.get("mask_decoder.output.mask_tokens.weight")
    if token is not None and token.shape[1] == output.mask_tokens.weight.shape[1]:
        output.mask_tokens.weight.copy_(token[:1].expand_as(output.mask_tokens.weight))
    for hypernetwork in output.hypernetworks:
        for name, parameter in hypernetwork.named_parameters():
            tensor = named.get(f"mask_decoder.output.hypernetworks.0.{name}")
            if tensor is not None and tensor.shape == parameter.shape:
                parameter.copy_(tensor)


def _parts(folder: Path) -> list[Path]:
    """The weight files in a folder that transformers saved."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise FlapsamError(f"{index}: not a readable index of weight files; save or download the model again") from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
    raise FlapsamError(f"{folder}: no model.safetensors or pytorch_model.bin found; give a folder that transformers saved")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FlapsamError(f"{path}: no such checkpoint; check the path") from error
    except pickle.UnpicklingError as error:
        raise FlapsamError(
            f"{path}: not opened, since it holds more than tensors and could run code; give a plain state dictionary"
        ) from error
    except (SafetensorError, BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise FlapsamError(f"{path}: not a readable checkpoint; is it truncated?") from error
    if isinstance(state, dict) and state.keys() == {"model"}:
        state = state["model"]  # Meta's files of SAM 2.1
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FlapsamError(f"{path}: not a state dictionary; give a file that maps names to tensors")
    return state


def find_checkpoint(backbone: Backbone) -> Checkpoint:
    """The checkpoint of a backbone: the one in ``backbone.weights``, else the one that ships with flapsam or was downloaded.

    Raises:
        FlapsamError: the weights are not on this machine.
    """
    if backbone.weights == RANDOM:
        return RANDOM
    if backbone.weights is not None:
        # The name of a known backbone is allowed in place of a file.
        return local_checkpoint(str(backbone.weights)) or Path(backbone.weights)
    path = local_checkpoint(backbone.name)
    if path is None:
        raise FlapsamError(
            f"backbone {backbone.name}: its weights are not on this machine; run `flapsam backbone get {backbone.name}`, or "
            "set backbone.weights to a checkpoint or to random"
        )
    return path


def local_checkpoint(name: str) -> Path | None:
    """The file of a known backbone's weights, if it is on this machine."""
    known = SOURCES.get(name)
    if known is None or not known.file:
        return None
    path = (SHIPPED if known.ships else cache_folder()) / known.file
    return path if path.exists() else None
