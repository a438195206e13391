"""Measure the memory of a training step, and find how many windows fit."""

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from flapsam.base.device import find_device
from flapsam.learning.training import loss_of
from flapsam.run.config import RANDOM, Backbone, Lora, Training
from flapsam.sam import Sam, assemble, checkpoint_layers

SHARE = 0.8
"""Part of the free memory that a step may take."""


def step_bytes(network: Sam, slices: int, options: Training, precision: str = "fp32") -> int:
    """Bytes that a forward and backward pass takes beyond the parameters and their gradients.

    On a GPU, this is the peak that its allocator reports. Elsewhere, it is what autograd keeps between forward and backward,
    without the scratch space of single operations.

    Args:
        network: the network. Its gradients are cleared afterwards.
        slices: number of slices in the step.
        options: training options, of which the loss is used.
        precision: ``bf16`` runs the network under autocast.
    """
    device = network.pixel_mean.device
    size = network.image_size
    images = torch.zeros(slices, 1, size, size, device=device)
    labels = torch.zeros(slices, size, size, dtype=torch.int64, device=device)
    parameter_addresses = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameter_addresses:
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
    """Free memory of a GPU in bytes or, for other devices, of the machine."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # What PyTorch keeps for later would otherwise count as taken.
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def windows_that_fit(
    network: Sam, options: Training, precision: str = "fp32", free: int | None = None, sharing: int = 1
) -> int:
    """Number of a batch's windows that fit through the network at once within ``SHARE`` of the free memory, at least one.

    Two small steps are measured after a first one, which also takes memory that stays. Every further slice adds the same
    amount of memory.

    Args:
        network: the network, ready to train.
        options: training options, of which window, batch size and loss are used.
        precision: ``bf16`` runs the network under autocast.
        free: free memory in bytes; that of the network's device if None.
        sharing: number of processes that train in this memory.
    """
    constant, a_slice = _line(network, options, precision)
    free = free_bytes(network.pixel_mean.device) if free is None else free
    available = SHARE * free / sharing - learned_bytes(network) - constant
    return min(max(int(available / a_slice / options.window), 1), options.batch_size)


def training_bytes(network: Sam, options: Training, precision: str = "fp32") -> int:
    """Bytes that a fit takes beyond the parameters: gradients, moments and the slices of one pass through the network."""
    constant, a_slice = _line(network, options, precision)
    windows = options.micro_batch if isinstance(options.micro_batch, int) else options.batch_size
    return learned_bytes(network) + constant + a_slice * windows * options.window


def learned_bytes(network: Sam) -> int:
    """Bytes that the gradients and Adam's two moments take."""
    return 3 * sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)


def _line(network: Sam, options: Training, precision: str) -> tuple[int, int]:
    """Bytes that a step takes whatever its number of slices, and bytes that every slice adds."""
    if network.pixel_mean.device.type == "cuda":
        step_bytes(network, 1, options, precision)
    with_one, with_two = (step_bytes(network, slices, options, precision) for slices in (1, 2))
    a_slice = max(with_two - with_one, 1)
    return with_one - a_slice, a_slice


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step in bytes: parameters, gradients, moments and the slices in the step."""

    slices: int
    """Number of slices in the step."""
    straight: int
    """Bytes without gradient checkpointing."""
    checkpointing: int
    """Bytes with gradient checkpointing in the image encoder."""


def memory_table(
    backbone: str, *, image_size: int | None, strategy: str, rank: int, device: str, precision: str
) -> list[StepMemory]:
    """Memory of training steps with 1, 2, 4, 8 and 16 slices, for two classes.

    Raises:
        FlapsamError: a name is unknown, or the image size does not fit the backbone.
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
    checkpoint_layers(network)
    checkpointing = _line(network, Training(), precision)

    def total(line: tuple[int, int], slices: int) -> int:
        return fixed + line[0] + line[1] * slices

    return [StepMemory(slices, total(straight, slices), total(checkpointing, slices)) for slices in (1, 2, 4, 8, 16)]
