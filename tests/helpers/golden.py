"""Values of the reference implementation, and its small network."""

import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flapsam.run.config import Lora
from flapsam.sam import Sam, build, load_checkpoint, load_trained, read_checkpoint, travelling_state
from flapsam.sam.families import to_own_names
from flapsam.sam.lora import apply_strategy
from flapsam.sam.strategies import STRATEGIES
from flapsam.sam.vit import Vit
from tests.helpers.places import GOLDEN


def golden(name: str) -> dict[str, Tensor]:
    """Tensors of the reference implementation."""
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_json(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_sizes() -> Vit:
    sizes = golden_json("forward")["config"]
    return Vit(
        width=sizes["dim"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        global_blocks=tuple(sizes["glob"]),
        window=sizes["window"],
        native_size=sizes["img"],
        decoder_width=sizes["out"],
        decoder_heads=sizes["dec_heads"],
        decoder_mlp=sizes["dec_mlp"],
        upscaling=(8, 4, 2, 1),
    )


def golden_network() -> Sam:
    """The reference's small SAM with its random weights, without adapters."""
    network = build(golden_sizes(), image_size=96, classes=2)
    load_checkpoint(network, read_checkpoint(GOLDEN / "sam.safetensors"), "golden", keep_masks=True)
    return network


def golden_network_with_lora() -> Sam:
    """The same network with the reference's adapters. All parameters train."""
    network = apply_strategy(golden_network(), STRATEGIES["flap"], Lora(rank=4))
    adapters = {reference_to_public(name): tensor for name, tensor in golden("lora").items()}
    load_trained(network, {**travelling_state(network), **adapters})
    return network.requires_grad_(True)


def reference_to_public(name: str) -> str:
    """The network's name for a parameter of the reference. For a fused qkv, the name of q."""
    for letter in "ab":
        for part in "qv":
            for suffix in (".0.weight", ".weight"):
                end = f"lora_w_{letter}_{part}{suffix}"
                if name.endswith(end):
                    name = name.removesuffix(end) + f"{part}_proj.lora_{letter.upper()}.weight"
    return next(iter(to_own_names({name: torch.zeros(3, 1)})))
