"""The traffic of a run, known before anything runs: parameters counted from the network, and packets predicted."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import SERVER, VALIDATION, Agreement, cut
from flapsam.federation.packets import Contract, Header, encode, seal
from flapsam.federation.preparation import resolve
from flapsam.federation.secure_aggregation.ring import LEAST_BITS, Ring
from flapsam.learning.training import FIT_METRICS
from flapsam.run.config import Lora, OutputPart, Projection, RunConfig
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
"""Size of a parameter in bytes. It travels as float32."""


@dataclass(frozen=True)
class StrategyTraffic:
    """A row of the paper's Figure 1."""

    strategy: str
    paper_name: str
    parameters: int
    gib: float
    """Traffic of one client in both directions and all rounds, uncompressed."""
    less: float
    """Traffic of ``full`` divided by this one."""


@dataclass(frozen=True)
class RunTraffic:
    """Predicted bytes of one site in a whole run."""

    rank: int
    """Rank of the site's adapters."""
    rounds: int
    """Number of rounds, at most. A run may settle sooner."""
    parameters: int
    """Number of parameters that train and travel."""
    up: float
    down: float
    full: float
    """Bytes that full fine-tuning would send as float32, in both directions."""

    @property
    def ratio(self) -> float:
        """Traffic of full fine-tuning divided by that of the run."""
        return self.full / (self.up + self.down)


def strategy_table(
    backbone: str,
    *,
    image_size: int | None = None,
    classes: int = 2,
    rank: int = 32,
    projections: Sequence[Projection] = ("q", "v"),
    rounds: int = 100,
) -> list[StrategyTraffic]:
    """The traffic of all registered strategies, in the registry's order. By default, adapters are where the paper has them.

    Raises:
        FlapsamError: the backbone is unknown or the image size does not fit it.
    """
    sizes = architecture(source(backbone).architecture)
    size = image_size or sizes.default_size
    counts = {name: _count(sizes, name, size, classes, rank, tuple(projections)) for name in STRATEGIES}
    return [
        StrategyTraffic(name, STRATEGIES[name].paper_name, count, count * BYTES * 2 * rounds / 2**30, counts["full"] / count)
        for name, count in counts.items()
    ]


def full_packet_bytes(config: RunConfig) -> int:
    """Bytes of the parameters of full fine-tuning, in one direction."""
    return BYTES * _parameters(_outline_of(config, "full"))


def predict_traffic(config: RunConfig) -> list[RunTraffic]:
    """Predict the bytes of a site in a run, for each rank that sites have, largest first.

    Neither data nor weights are read. Packets are written as in the run, from synthetic tensors, and measured.

    Raises:
        FlapsamError: a name in the configuration is unknown or the image size does not fit.
    """
    config = resolve(config)
    outline = _outline_of(config, config.strategy)
    agreement = _agreement(config, outline)
    full = 2.0 * full_packet_bytes(config) * config.rounds.count
    parameters = _parameters(outline)
    ranks = sorted({config.lora.rank, *config.site_ranks.values()}, reverse=True)
    return [RunTraffic(rank, config.rounds.count, parameters, *_site_bytes(agreement, rank, config), full) for rank in ranks]


@cache
def _count(
    sizes: Architecture, name: str, image_size: int, classes: int, rank: int, projections: tuple[Projection, ...]
) -> int:
    lora = Lora(rank=rank, projections=list(projections))
    return _parameters(_outline(sizes, name, image_size=image_size, classes=classes, lora=lora))


def _outline(
    sizes: Architecture,
    name: str,
    *,
    image_size: int,
    classes: int,
    lora: Lora,
    frozen: Collection[OutputPart] = (),
    personal: Collection[str] = (),
) -> Sam:
    """The network without its weights, on the meta device."""
    with torch.device("meta"):
        network = build(sizes, image_size=image_size, classes=classes)
        return apply_strategy(network, strategy(name), lora, frozen=frozen, personal=personal)


def _outline_of(config: RunConfig, strategy_name: str) -> Sam:
    sizes = architecture(source(config.backbone.name).architecture)
    size = config.samples.size or sizes.default_size
    classes = len(config.data.classes)
    return _outline(
        sizes,
        strategy_name,
        image_size=size,
        classes=classes,
        lora=config.lora,
        frozen=config.frozen,
        # Full fine-tuning, for one, has no adapters that could be personal.
        personal=config.personal if strategy_name == config.strategy else (),
    )


def _parameters(network: Sam) -> int:
    """Number of parameters that train and travel."""
    return sum(parameter.numel() for parameter in travelling(network).values())


def _agreement(config: RunConfig, outline: Sam) -> Agreement:
    """The agreement of the run, but with synthetic tensors."""
    method = aggregator(config.aggregator, config.lora.rank)
    trained = travelling(outline).keys()
    names = {*trained, *(adapted_weights(trained) if method.base_weights else ())}
    draw = torch.Generator().manual_seed(config.seed)
    start = {
        name: _synthetic(parameter.shape, draw) for name, parameter in sorted(named_parameters(outline)) if name in names
    }
    run = "0" * 32
    return Agreement(run, start, trained, method, config.compression, config.site_ranks, secure=config.secure)


def _synthetic(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Draw normally distributed numbers at a random scale for each tensor, as in real differences."""
    return torch.randn(shape, generator=draw) * torch.randn(1, generator=draw).exp()


def _site_bytes(agreement: Agreement, rank: int, config: RunConfig) -> tuple[float, float]:
    """Bytes that a site of this rank sends and receives in all rounds."""
    site = next((site for site, own in config.site_ranks.items() if own == rank), SERVER)
    reported = [*FIT_METRICS, *(VALIDATION + name for name in ("mean", *config.data.classes))]
    header = Header(run=agreement.run, round=1, base=0, sender=site, samples=1000, metrics=dict.fromkeys(reported, 1 / 3))
    from_server = Header(run=agreement.run, round=1, base=0, sender=SERVER)
    tensors = cut(agreement.start, rank)
    up, down = 0, len(encode(from_server, agreement.nothing(rank), {}))
    for first in (1, 2):
        # What travels may differ between odd and even rounds, but not otherwise.
        times = len(range(first, config.rounds.count + 1, 2))
        if times:
            contract = agreement.up(site, first)
            up += times * (_masked_size(header, contract) if agreement.secure else _size(header, contract, tensors))
            down += times * _size(from_server, agreement.down(rank, first), tensors)
    return up, down


def _masked_size(header: Header, contract: Contract) -> int:
    """Size of a masked packet with up to 15 sites of equal shares. Masks cannot be compressed."""
    noise = torch.randint(0, 256, (Ring(LEAST_BITS).size(contract.numbers),), dtype=torch.uint8)
    return len(seal(header, contract, {"values": noise}))


def _size(header: Header, contract: Contract, tensors: Mapping[str, Tensor]) -> int:
    return len(encode(header, contract, {name: tensors[name] for name in contract.shapes}))
