"""Applying a strategy to a network, and the tensors that travel.

Outside this module, parameters have the network's own names. They leave out what PEFT inserts (``base_layer``,
``default``), so that a name does not depend on whether its layer has an adapter.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flapsam.base.errors import FlapsamError
from flapsam.run.config import Lora, OutputPart, Projection
from flapsam.sam.network import Sam
from flapsam.sam.slice_adapters import add_slice_adapters
from flapsam.sam.strategies import OUTPUT, Strategy

ADAPTER = "default"
PROJECTIONS: Mapping[Projection, tuple[str, ...]] = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "out": ("attn.proj", "out_proj"),
}
"""Projection → names of its layers in the encoder's and the decoder's attention."""


def lora_config(lora: Lora, depth: int) -> LoraConfig:
    """PEFT's configuration of low-rank adapters with scale 1. PEFT initialises A, and B starts at zero.

    Args:
        lora: rank and location of the adapters.
        depth: number of blocks in the image encoder.
    """
    return LoraConfig(r=lora.rank, lora_alpha=lora.rank, lora_dropout=0.0, bias="none", target_modules=_targets(lora, depth))


def _targets(lora: Lora, depth: int) -> list[str] | str:
    """The adapted layers in PEFT's terms: suffixes of names, or a pattern of the whole name for a part of the network."""
    names = [name for projection in lora.projections for name in PROJECTIONS[projection]]
    if {"encoder", "decoder"} <= set(lora.layers):
        return names
    half = depth // 2
    blocks = {"encoder": range(depth), "encoder-first": range(half), "encoder-last": range(half, depth)}
    adapted = sorted({block for part in lora.layers for block in blocks.get(part, ())})
    places = [rf"vision_encoder\.layers\.({'|'.join(map(str, adapted))})"] if adapted else []
    places += ["mask_decoder"] if "decoder" in lora.layers else []
    return rf"({'|'.join(places)})\.(.*\.)?({'|'.join(map(re.escape, names))})"


def apply_strategy(
    network: Sam,
    strategy: Strategy,
    lora: Lora,
    *,
    frozen: Collection[OutputPart] = (),
    personal: Collection[str] = (),
    seed: int = 0,
) -> Sam:
    """Add the strategy's adapters in place and let only its parameters and the personal ones train.

    Args:
        network: a network from ``build``.
        strategy: the strategy, which decides what trains.
        lora: the configuration of the adapters, if the strategy has any. Those in which slices meet have its rank as their
            number of channels.
        frozen: parts of the decoder's output that do not train.
        personal: patterns of the names of parameters that train but never travel.
        seed: seed of the adapters' initial weights. The global random state stays as it was.

    Raises:
        FlapsamError: no parameter has a name that fits one of the patterns.
    """
    if strategy.lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(lora_config(lora, len(network.vision_encoder.layers)), network)
            for module in network.modules():
                if isinstance(module, BaseTunerLayer):
                    layer: Any = module
                    # Under autocast, PEFT would convert half precision back, only to have it converted again.
                    layer.cast_input_dtype_enabled = False
            if strategy.volume:
                add_slice_adapters(network.vision_encoder, lora.rank, network.stack)
    stay = tuple(f"{OUTPUT.removesuffix('*')}{part.replace('-', '_')}." for part in frozen)
    parameters = dict(named_parameters(network))
    for name, parameter in parameters.items():
        parameter.requires_grad_(strategy.selects(name) and not name.startswith(stay))
    own: set[str] = set()
    for pattern in personal:
        matching = {name for name in parameters if fnmatchcase(name, pattern) and not name.startswith(stay)}
        if not matching:
            example = max(parameters)
            raise FlapsamError(
                f"personal: no parameter outside frozen matches '{pattern}'; one of the names is {example}, and * stands "
                "for any text"
            )
        own |= matching
    for name in own:
        parameters[name].requires_grad_(True)
    network.personal = frozenset(own)
    return network


def named_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters with their public names."""
    for name, parameter in network.named_parameters():
        yield public_name(name), parameter


def public_name(name: str) -> str:
    """The name of a parameter without what PEFT inserts."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, sorted by name."""
    return dict(sorted((name, p) for name, p in named_parameters(network) if p.requires_grad))


def travelling(network: Sam) -> dict[str, nn.Parameter]:
    """The parameters that train and travel, sorted by name."""
    return {name: parameter for name, parameter in trained(network).items() if name not in network.personal}


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """Copy the tensors that train to the CPU."""
    return tensors_of(network, trained(network))


def travelling_state(network: Sam) -> dict[str, Tensor]:
    """Copy the tensors that travel to the CPU."""
    return tensors_of(network, travelling(network))


def load_trained(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors that train, and any others among ``tensors``.

    Raises:
        ValueError: a tensor that trains is missing, or a name or shape is not the network's.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(network)}
    mismatched = {name for name, tensor in tensors.items() if shapes.get(name) != tuple(tensor.shape)}
    mismatched |= trained(network).keys() - tensors.keys()
    if mismatched:
        raise ValueError(f"{len(mismatched)} tensors differ in name or shape, the first is {min(mismatched)}")
    load_tensors(network, tensors)


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load parameters by their public names."""
    with torch.no_grad():
        for name, parameter in named_parameters(network):
            if name in tensors:
                parameter.copy_(tensors[name])


def tensors_of(network: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Copy the parameters with these public names to the CPU in float32, sorted by name."""
    chosen = sorted((name, parameter) for name, parameter in named_parameters(network) if name in names)
    return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in chosen}


def adapted_weights(names: Collection[str]) -> set[str]:
    """Names of the base weights of the layers both of whose factors are among ``names``."""
    layers = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    return {f"{layer}.weight" for layer in layers if f"{layer}.lora_B.weight" in names}


@contextmanager
def only_these_train(network: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Until the context ends, freeze the trainable parameters that are not among these public names."""
    resting = [parameter for name, parameter in trained(network).items() if name not in names]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


def merge_adapters(network: Sam) -> Sam:
    """Add the low-rank products to the layers that they adapt, in place. Only plain layers remain, and none trains."""
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
    return network.requires_grad_(False)


def frozen_checksum(network: Sam) -> str:
    """SHA-256 of all weights that do not train. An adapter is valid only on top of exactly these."""
    digest = hashlib.sha256()
    stays = {name: p for name, p in named_parameters(network) if not p.requires_grad}
    stays |= {public_name(name): buffer for name, buffer in network.named_buffers()}
    for name, tensor in sorted(stays.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
