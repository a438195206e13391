"""What travels: counted from the network itself, and predicted from what server and sites agree on, before anything runs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import SERVER, VALIDATION, Agreement, cut
from flapsam.federation.packets import Contract, Header, encode
from flapsam.federation.preparation import resolve
from flapsam.learning.training import FIT_METRICS
from flapsam.run.config import Lora, OutputPart, RunConfig
from flapsam.sam import (
    STRATEGIES,
    Architecture,
    Sam,
    adapted_weights,
    apply_strategy,
    architecture,
    build,
    named_parameters,
    strategy,
    travelling,
)
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


@dataclass(frozen=True)
class RunTraffic:
    """Predicted bytes of one site in a whole run."""

    rank: int
    """Of the site's adapters."""
    rounds: int
    """At most: a run may settle sooner."""
    parameters: int
    """That train."""
    up: float
    down: float
    full: float
    """What full fine-tuning would send as float32, both ways."""

    @property
    def ratio(self) -> float:
        """How many times less travels than with full fine-tuning."""
        return self.full / (self.up + self.down)


def strategy_table(
    backbone: str, *, image_size: int | None = None, classes: int = 2, rank: int = 32, rounds: int = 100
) -> list[StrategyTraffic]:
    """All strategies of the registry, in its order.

    Raises:
        FlapsamError: the backbone is unknown or the image size does not fit it.
    """
    sizes = architecture(source(backbone).architecture)
    size = image_size or sizes.default_size
    counts = {name: _count(sizes, name, size, classes, rank) for name in STRATEGIES}
    return [
        StrategyTraffic(name, STRATEGIES[name].paper_name, count, count * BYTES * 2 * rounds / 2**30, counts["full"] / count)
        for name, count in counts.items()
    ]


def full_packet_bytes(config: RunConfig) -> int:
    """Bytes that the parameters of full fine-tuning would take one way."""
    return BYTES * _parameters(_outline_of(config, "full"))


def predict_traffic(config: RunConfig) -> list[RunTraffic]:
    """Bytes of a site in a run, for each rank that sites have, largest first; without data and without a checkpoint.

    Packets are made as in the run, of numbers from a normal distribution, and weighed.

    Raises:
        FlapsamError: a name in the configuration is unknown or the image size does not fit.
    """
    config = resolve(config)
    outline = _outline_of(config, config.strategy)
    agreement = _agreement(config, outline)
    full = 2.0 * full_packet_bytes(config) * config.rounds.count
    parameters = _parameters(outline)
    ranks = sorted({config.lora.rank, *config.site_ranks.values()}, reverse=True)
    return [RunTraffic(rank, config.rounds.count, parameters, *_weighed(agreement, rank, config), full) for rank in ranks]


@cache
def _count(sizes: Architecture, name: str, image_size: int, classes: int, rank: int) -> int:
    return _parameters(_outline(sizes, name, image_size=image_size, classes=classes, lora=Lora(rank=rank)))


def _outline(
    sizes: Architecture, name: str, *, image_size: int, classes: int, lora: Lora, frozen: Collection[OutputPart] = ()
) -> Sam:
    """The network without its weights."""
    with torch.device("meta"):
        network = build(sizes, image_size=image_size, classes=classes)
        return apply_strategy(network, strategy(name), lora, frozen=frozen)


def _outline_of(config: RunConfig, strategy_name: str) -> Sam:
    sizes = architecture(source(config.backbone.name).architecture)
    size = config.samples.size or sizes.default_size
    classes = len(config.data.classes)
    return _outline(sizes, strategy_name, image_size=size, classes=classes, lora=config.lora, frozen=config.frozen)


def _parameters(network: Sam) -> int:
    """That train and travel."""
    return sum(parameter.numel() for parameter in travelling(network).values())


def _agreement(config: RunConfig, outline: Sam) -> Agreement:
    """As in the run, over tensors that are made up."""
    method = aggregator(config.aggregator, config.lora.rank)
    trained = travelling(outline).keys()
    names = {*trained, *(adapted_weights(trained) if method.base_weights else ())}
    draw = torch.Generator().manual_seed(config.seed)
    start = {name: _made_up(parameter.shape, draw) for name, parameter in sorted(named_parameters(outline)) if name in names}
    run = "0" * 32
    return Agreement(run, start, trained, method, config.compression, config.site_ranks)


def _made_up(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Numbers from a normal distribution, of another size in every tensor, as differences are."""
    return torch.randn(shape, generator=draw) * torch.randn(1, generator=draw).exp()


def _weighed(agreement: Agreement, rank: int, config: RunConfig) -> tuple[float, float]:
    """Bytes up and down of a site of this rank in all rounds."""
    site = next((site for site, own in config.site_ranks.items() if own == rank), SERVER)
    reported = [*FIT_METRICS, *(VALIDATION + name for name in ("mean", *config.data.classes))]
    header = Header(run=agreement.run, round=1, base=0, sender=site, samples=1000, metrics=dict.fromkeys(reported, 1 / 3))
    from_server = Header(run=agreement.run, round=1, base=0, sender=SERVER)
    tensors = cut(agreement.start, rank)
    up, down = 0, len(encode(from_server, agreement.nothing(rank), {}))
    for first in (1, 2):
        # What travels may differ between odd and even rounds, and no further.
        times = len(range(first, config.rounds.count + 1, 2))
        if times:
            up += times * _size(header, agreement.up(site, first), tensors)
            down += times * _size(from_server, agreement.down(rank, first), tensors)
    return up, down


def _size(header: Header, contract: Contract, tensors: Mapping[str, Tensor]) -> int:
    return len(encode(header, contract, {name: tensors[name] for name in contract.shapes}))
