"""How much memory a training step takes, measured, and how many windows fit."""

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from flapsam.base.device import find_device
from flapsam.learning.training import loss_of
from flapsam.run.config import RANDOM, Backbone, Lora, Training
from flapsam.sam import Sam, assemble
from flapsam.sam.encoder import checkpoint_layers

SHARE = 0.8
"""Of the free memory, what a step may take."""


def step_bytes(network: Sam, slices: int, options: Training, precision: str = "fp32") -> int:
    """Bytes that a forward and backward pass takes beyond the parameters and their gradients.

    On a GPU what its allocator measured at the peak; elsewhere what is kept between forward and backward, which leaves out
    the scratch space of single operations.

    Args:
        network: its gradients are gone afterwards.
        slices: that go through it at once.
        options: the loss.
        precision: ``bf16`` runs the network under autocast.
    """
    device = network.pixel_mean.device
    size = network.image_size
    images = torch.zeros(slices, 1, size, size, device=device)
    labels = torch.zeros(slices, size, size, dtype=torch.int64, device=device)
    known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor
        return tensor

    network.train()
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(network, (images, labels), device, options, precision)
    loss.total.backward()
    network.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def windows_that_fit(network: Sam, options: Training, precision: str = "fp32", free: int | None = None) -> int:
    """Windows of a batch that go through the network at once within ``SHARE`` of the free memory; at least one.

    Two small steps are measured; memory grows by the same amount with every slice.

    Args:
        network: ready to train.
        options: window, batch and loss.
        precision: ``bf16`` runs the network under autocast.
        free: bytes; those of the network's device if not given.
    """
    constant, a_slice = _line(network, options, precision)
    available = SHARE * (free_bytes(network.pixel_mean.device) if free is None else free) - learned_bytes(network) - constant
    return min(max(int(available / a_slice / options.window), 1), options.batch_size)


def training_bytes(network: Sam, options: Training, precision: str = "fp32") -> int:
    """Bytes that fitting takes beyond the parameters: gradients, moments, and the slices that are at once in a step."""
    constant, a_slice = _line(network, options, precision)
    windows = options.micro_batch if isinstance(options.micro_batch, int) else options.batch_size
    return learned_bytes(network) + constant + a_slice * windows * options.window


def learned_bytes(network: Sam) -> int:
    """Bytes of the gradients and of Adam's two moments."""
    return 3 * sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)


def _line(network: Sam, options: Training, precision: str) -> tuple[int, int]:
    """Bytes of a step that every batch takes, and those that every slice adds."""
    one, two = (step_bytes(network, slices, options, precision) for slices in (1, 2))
    a_slice = max(two - one, 1)
    return one - a_slice, a_slice


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step: parameters, gradients, moments, and what so many slices at once take."""

    slices: int
    straight: int
    checkpointing: int


def memory_table(
    backbone: str, *, image_size: int | None, strategy: str, rank: int, device: str, precision: str
) -> list[StepMemory]:
    """What 1, 2, 4, … 16 slices at once take, with two classes.

    Raises:
        FlapsamError: a name is unknown or the image size does not fit.
    """
    network = assemble(
        Backbone(name=backbone, weights=RANDOM),
        image_size=image_size,
        classes=2,
        strategy_name=strategy,
        lora=Lora(rank=rank),
        seed=0,
    ).network.to(find_device(device))
    fixed = sum(p.numel() * p.element_size() for p in network.parameters()) + learned_bytes(network)
    straight = _line(network, Training(), precision)
    checkpoint_layers(network.vision_encoder)
    checkpointing = _line(network, Training(), precision)

    def total(line: tuple[int, int], slices: int) -> int:
        return fixed + line[0] + line[1] * slices

    return [StepMemory(slices, total(straight, slices), total(checkpointing, slices)) for slices in (1, 2, 4, 8, 16)]
