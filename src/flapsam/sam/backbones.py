"""Listing, downloading and describing backbones, for the command line."""

from pathlib import Path
from typing import Any

from flapsam.base.download import cache_folder, checksum, download
from flapsam.run.observer import Observer, watched
from flapsam.sam import architecture, infer_architecture, read_checkpoint
from flapsam.sam.checkpoints import local_checkpoint
from flapsam.sam.naming import naming_of, to_own_names
from flapsam.sam.sources import SOURCES, source


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
        download(known.url or "", path, sha256=known.sha256, on_bytes=watched(observer, name))
        observer.end()
        read_checkpoint(path)
    return path


def describe(path: Path) -> dict[str, Any]:
    """Describe a checkpoint: architecture, tensor names, image size, parameters, checksum and the file's own metadata.

    Raises:
        FlapsamError: the file is not a SAM checkpoint.
    """
    state = read_checkpoint(path)
    named = to_own_names(state)
    name = infer_architecture(state)
    grid = named["vision_encoder.pos_embed"].shape[1]
    patch = architecture(name).patch if name else named["vision_encoder.patch_embed.projection.weight"].shape[-1]
    return {
        "architecture": name or "unknown size",
        "names": {"meta": "Meta's", "transformers": "those of transformers", "flapsam": "flapsam's own"}[
            naming_of(state) or "meta"
        ],
        "image size": grid * patch,
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "masks": len(named["mask_decoder.output.mask_tokens.weight"]),
        "SHA-256": checksum(path) if path.is_file() else "none, since this is a folder",
        **_metadata(path),
    }


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
