"""Adapters for tests, on a small network with random weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flapsam.adapters.store import AdapterCard, BackboneCard, save_adapter
from flapsam.run.config import Backbone, Lora, OutputPart, Samples
from flapsam.sam import Assembled, assemble, travelling, travelling_state


def trained(
    name: str,
    *,
    backbone: str = "sam-tiny-1",
    seed: int = 3,
    size: int = 64,
    lora: Lora = Lora(rank=4),
    frozen: Sequence[OutputPart] = (),
) -> tuple[Assembled, AdapterCard]:
    """Return a network whose travelling tensors were perturbed, as by training, and its adapter card."""
    chosen = Backbone(name=backbone, weights="random")
    assembled = assemble(chosen, image_size=size, classes=2, strategy_name=name, lora=lora, frozen=frozen, seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in travelling(assembled.network).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    card = AdapterCard(
        run="r",
        mode="federated",
        rounds=1,
        strategy=name,
        lora=lora,
        frozen=list(frozen),
        backbone=BackboneCard(
            name=backbone, pixels="paper", weights="random", masks="new", seed=seed, checksum=assembled.origin.checksum
        ),
        samples=Samples(size=size),
        classes=["kidney", "tumour"],
        labels={"kidney": 1, "tumour": 2},
        licence="Apache-2.0",
    )
    return assembled, card


def saved(folder: Path, name: str = "flap", *, seed: int | None = None) -> Path:
    """Save such an adapter and return its folder. With ``seed``, its card names that seed instead of the real one."""
    assembled, card = trained(name)
    if seed is not None:
        card = card.model_copy(update={"backbone": card.backbone.model_copy(update={"seed": seed})})
    save_adapter(folder, card, travelling_state(assembled.network))
    return folder


def saved_lively(folder: Path) -> Path:
    """Save an adapter that finds every class in smooth noise, so that label maps can be compared. Return its folder."""
    assembled, card = trained("flap")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(107)
        for name, parameter in travelling(assembled.network).items():
            if "hypernetworks" in name or "mask_tokens" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(folder, card, travelling_state(assembled.network))
    return folder
