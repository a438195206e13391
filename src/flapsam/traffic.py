"""What each strategy sends: counted from the network itself, without making its weights."""

from dataclasses import dataclass

import torch

from flapsam.config import Lora, RunConfig
from flapsam.sam import STRATEGIES, Architecture, apply_strategy, architecture, build, strategy, travelling
from flapsam.sam.sources import source

BYTES = 4
"""A parameter travels as float32."""


@dataclass(frozen=True)
class StrategyTraffic:
    """One row of the paper's Figure 1."""

    strategy: str
    paper_name: str
    parameters: int
    gib: float
    """Both directions, all rounds, one client, uncompressed."""
    less: float
    """How many times less than ``full``."""


def travelling_parameters(sizes: Architecture, name: str, *, image_size: int, classes: int, lora: Lora) -> int:
    """Parameters that a strategy trains and sends."""
    with torch.device("meta"):
        network = apply_strategy(build(sizes, image_size=image_size, classes=classes), strategy(name), lora)
    return sum(parameter.numel() for parameter in travelling(network).values())


def strategy_table(
    backbone: str, *, image_size: int | None = None, classes: int = 2, rank: int = 32, rounds: int = 100
) -> list[StrategyTraffic]:
    """All strategies of the registry, in its order.

    Raises:
        FlapsamError: the backbone is unknown or the image size does not fit it.
    """
    sizes = architecture(source(backbone).architecture)
    size = image_size or sizes.default_size
    lora = Lora(rank=rank)
    counts = {name: travelling_parameters(sizes, name, image_size=size, classes=classes, lora=lora) for name in STRATEGIES}
    return [
        StrategyTraffic(name, STRATEGIES[name].paper_name, count, count * BYTES * 2 * rounds / 2**30, counts["full"] / count)
        for name, count in counts.items()
    ]


def full_packet_bytes(config: RunConfig) -> int:
    """Bytes that the parameters of full fine-tuning would take one way."""
    sizes = architecture(source(config.backbone.name).architecture)
    size = config.samples.size or sizes.default_size
    return BYTES * travelling_parameters(sizes, "full", image_size=size, classes=len(config.data.classes), lora=config.lora)
