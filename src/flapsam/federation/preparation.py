"""What every participant makes of a run's configuration before the first round: data, network and agreement."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from flapsam.adapters.store import AdapterCard, BackboneCard
from flapsam.base.device import find_device, set_up_torch
from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError, choose
from flapsam.federation.aggregation import Aggregator, aggregator
from flapsam.federation.agreement import Agreement
from flapsam.federation.client import ClientData
from flapsam.federation.compression import codec
from flapsam.federation.server_optimizers import SERVER_OPTIMIZERS
from flapsam.learning.memory import windows_that_fit
from flapsam.learning.prepared import PreparedCase, prepare
from flapsam.run.config import Compression, RunConfig
from flapsam.sam import (
    Assembled,
    Origin,
    Sam,
    adapted_weights,
    architecture,
    assemble_run,
    strategy,
    tensors_of,
    travelling_state,
)
from flapsam.sam.checkpoints import find_checkpoint
from flapsam.sam.encoder import checkpoint_layers
from flapsam.sam.sources import source
from flapsam.sites import Case, Site, label_map
from flapsam.sites.pairs import check_geometry
from flapsam.volumes import count_modalities, read_geometry


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with everything left open filled in.

    Raises:
        FlapsamError: a name in it is unknown.
    """
    sizes = architecture(source(config.backbone.name).architecture)
    find_checkpoint(config.backbone)
    strategy(config.strategy)
    size = config.samples.size or sizes.default_size
    sizes.tokens(size)
    method = aggregator(config.aggregator, config.lora.rank)
    codec(config.compression)
    if choose("server.optimizer", config.server.optimizer, SERVER_OPTIMIZERS) and not method.keeps_basis:
        raise FlapsamError(
            f"server.optimizer: {config.server.optimizer} needs adapters whose rows mean the same from round to round, and "
            f"aggregator {config.aggregator} turns them; choose flexlora-aligned or fedavg"
        )
    larger = [site for site, rank in config.site_ranks.items() if rank > config.lora.rank]
    if larger:
        raise FlapsamError(f"site_ranks.{larger[0]}: larger than lora.rank, {config.lora.rank}; raise that one")
    return config.model_copy(
        update={
            "samples": config.samples.model_copy(update={"size": size}),
            "threads": config.threads or default_threads(),
            "device": str(find_device(config.device)),
        }
    )


def assembled_for(config: RunConfig) -> Assembled:
    """The network where and as the run wants it; torch is set up for it.

    Raises:
        FlapsamError: as ``sam.assemble``.
    """
    set_up_torch(config.threads or 1, deterministic=config.deterministic)
    assembled = assemble_run(config)
    assembled.network.to(config.device)
    if config.training.checkpointing:
        checkpoint_layers(assembled.network.vision_encoder)
    return assembled


def start_of(network: Sam, method: Aggregator) -> dict[str, Tensor]:
    """The global tensors that this aggregator begins with, from a network on which nothing was trained yet."""
    trained = travelling_state(network)
    more = adapted_weights(trained) if method.base_weights else set()
    return trained | tensors_of(network, more - trained.keys())


def agree(run: str, config: RunConfig, network: Sam) -> Agreement:
    """What server and sites of a federation agree on.

    Args:
        run: the run's id.
        config: resolved.
        network: as it was assembled, nothing trained yet.
    """
    method = aggregator(config.aggregator, config.lora.rank)
    start, trained = start_of(network, method), list(travelling_state(network))
    return Agreement(run, start, trained, method, config.compression, config.site_ranks)


def agree_alone(run: str, config: RunConfig, network: Sam) -> Agreement:
    """The same for one client without a federation: the mean of its tensors is those tensors, and nothing travels."""
    alone = config.model_copy(update={"aggregator": "fedavg", "compression": Compression(codec="fp32"), "site_ranks": {}})
    return agree(run, alone, network)


def check_pairs(sites: Sequence[Site]) -> None:
    """Check from headers alone, before long work begins, that every image and label map fit together.

    Raises:
        FlapsamError: two do not.
    """
    for site in sites:
        for case in site.cases:
            check_geometry(case, read_geometry(case.image, modalities=True), read_geometry(case.label))


def with_modalities(config: RunConfig, cases: Sequence[Case]) -> RunConfig:
    """The configuration with what the cases' headers say, which must be the same in all.

    Raises:
        FlapsamError: it is not.
    """
    counts = {case: count_modalities(case.images) for case in cases}
    first, number = next(iter(counts.items()))
    for case, count in counts.items():
        if count != number:
            raise FlapsamError(f"{case.image}: the case has {count} modalities, {first.image} has {number}")
    return config.model_copy(update={"samples": config.samples.model_copy(update={"modalities": number})})


def with_windows(config: RunConfig, network: Sam, known: int | None = None) -> RunConfig:
    """The configuration with a number in the place of ``micro_batch: auto``: what is known of the run, or measured now."""
    if config.training.micro_batch != "auto":
        return config
    windows = known or windows_that_fit(network, config.training, config.precision)
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch": windows})})


def prepare_site(site: Site, config: RunConfig, cache: Path, on_case: Callable[[], None] = lambda: None) -> ClientData:
    """Unpack a site's training and validation cases.

    Raises:
        FlapsamError: a case is not right.
    """
    labels = label_map(config.data, site.name)

    def unpacked(cases: Sequence[Case]) -> list[PreparedCase]:
        result = []
        for case in cases:
            result.append(prepare(case, labels, config.samples, cache))
            on_case()
        return result

    return ClientData(site.name, unpacked(site.of("train")), unpacked(site.of("val")))


def card_of(run: str, mode: str, rounds: int, config: RunConfig, origin: Origin) -> AdapterCard:
    """What is written beside a run's adapter."""
    return AdapterCard(
        run=run,
        mode=mode,
        rounds=rounds,
        strategy=config.strategy,
        lora=config.lora,
        frozen=config.frozen,
        backbone=BackboneCard(
            name=config.backbone.name,
            pixels=config.backbone.pixels,
            weights=Path(origin.checkpoint).name,
            masks=config.backbone.masks,
            seed=config.seed,
            checksum=origin.checksum,
        ),
        samples=config.samples,
        classes=config.data.classes,
        labels=config.data.labels,
        licence=config.licence or source(config.backbone.name).licence,
    )
