"""What every participant derives from a run's configuration before the first round: data, network and agreement."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flapsam.adapters.store import AdapterCard, BackboneCard
from flapsam.base.device import find_device, set_up_torch
from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError, choose
from flapsam.federation.aggregation import AGGREGATORS, Aggregator, aggregator
from flapsam.federation.agreement import Agreement
from flapsam.federation.client import ClientData
from flapsam.federation.compression import codec
from flapsam.federation.secure_aggregation.ring import LEAST_RANGE
from flapsam.federation.server_optimizers import SERVER_OPTIMIZERS
from flapsam.federation.state import ServerState
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
    checkpoint_layers,
    strategy,
    tensors_of,
    trained_state,
    travelling,
    travelling_state,
)
from flapsam.sam.checkpoints import find_checkpoint
from flapsam.sam.sources import source
from flapsam.sites import Case, Site, label_map
from flapsam.sites.pairs import check_geometry
from flapsam.volumes import count_modalities, read_geometry

if TYPE_CHECKING:
    from flapsam.federation.secure_aggregation.collector import Collector

FIRST_STEPS = 32
"""How many steps of full learning rate in the same direction the range of the first round allows."""


def resolve(config: RunConfig) -> RunConfig:
    """Fill in everything that the configuration leaves open.

    Raises:
        FlapsamError: a name in it is unknown, its values do not fit together, or this machine lacks what it names.
    """
    sizes = architecture(source(config.backbone.name).architecture)
    find_checkpoint(config.backbone)
    if strategy(config.strategy).volume and config.training.window < 3:
        raise FlapsamError(
            f"training.window: {config.strategy} needs neighbouring slices; set it to 3 or a larger odd number"
        )
    size = config.samples.size or sizes.default_size
    sizes.tokens(size)
    method = aggregator(config.aggregator, config.lora.rank)
    codec(config.compression)
    if config.secure:
        if not method.sums:
            sums = ", ".join(name for name, make in AGGREGATORS.items() if make(1).sums)
            raise FlapsamError(
                f"aggregator: {config.aggregator} needs every site's own tensors, but with secure aggregation the server "
                f"learns their sum alone; choose one of {sums}"
            )
        check_secure_installed()
    if choose("server.optimizer", config.server.optimizer, SERVER_OPTIMIZERS) and not method.keeps_basis:
        raise FlapsamError(
            f"server.optimizer: {config.server.optimizer} needs adapters that keep their basis from round to round, but "
            f"aggregator {config.aggregator} changes it; choose flexlora-aligned or fedavg"
        )
    larger = [site for site, rank in config.site_ranks.items() if rank > config.lora.rank]
    if larger:
        raise FlapsamError(f"site_ranks.{larger[0]}: larger than lora.rank, {config.lora.rank}; lower it or raise lora.rank")
    return config.model_copy(
        update={
            "samples": config.samples.model_copy(update={"size": size}),
            "threads": config.threads or default_threads(),
            "device": str(find_device(config.device)),
        }
    )


def with_threads(config: RunConfig, workers: int) -> RunConfig:
    """Give each of several workers an equal share of all cores, unless the configuration says how many threads it has."""
    if workers == 1 or config.threads is not None:
        return config
    return config.model_copy(update={"threads": max(1, default_threads() // workers)})


def assembled_for(config: RunConfig) -> Assembled:
    """Set up torch for the run and assemble its network on its device.

    Raises:
        FlapsamError: the network cannot be assembled, see ``sam.assemble``.
    """
    set_up_torch(config.threads or 1, deterministic=config.deterministic, precision=config.precision)
    if config.device.startswith("cuda:"):
        # Whatever names no GPU takes this one, and none other is touched.
        torch.cuda.set_device(config.device)
    assembled = assemble_run(config)
    assembled.network.to(config.device)
    if config.training.checkpointing:
        checkpoint_layers(assembled.network)
    return assembled


def start_of(network: Sam, method: Aggregator) -> dict[str, Tensor]:
    """The global tensors that this aggregator starts from, taken from a network that has not been trained yet."""
    travel = travelling_state(network)
    base_weights = adapted_weights(travel) if method.base_weights else set()
    return travel | tensors_of(network, base_weights - travel.keys())


def agree(run: str, config: RunConfig, network: Sam) -> Agreement:
    """Derive what server and sites of a federation agree on.

    Args:
        run: the run's id.
        config: the resolved configuration.
        network: the network as assembled, before any training.

    Raises:
        FlapsamError: everything that trains is personal.
    """
    method = aggregator(config.aggregator, config.lora.rank)
    start, sent = start_of(network, method), list(travelling(network))
    if not any(method.up(name, number) for name in sent for number in (1, 2)):
        raise FlapsamError("personal: nothing is left that the sites share; keep fewer parameters at the sites")
    personal = tensors_of(network, network.personal)
    return Agreement(run, start, sent, method, config.compression, config.site_ranks, personal, config.secure)


def collector_of(run: str, config: RunConfig, state: ServerState, shares: Mapping[str, float]) -> "Collector | None":
    """The server's side of secure aggregation; None for a run without it."""
    if not config.secure:
        return None
    from flapsam.federation.secure_aggregation.collector import Collector

    return Collector(run, state.folder, shares)


def check_secure_installed() -> None:
    """Check that the packages for secure aggregation are there.

    Raises:
        FlapsamError: one is missing.
    """
    if any(find_spec(name) is None for name in ("cryptography", "Crypto")):
        raise FlapsamError("secure aggregation needs other packages: pip install 'flapsam[secure]'")


def first_range(config: RunConfig) -> float:
    """The range of a number's change in the first round of secure aggregation, which no data tell.

    With Adam, a step changes a number by about the learning rate at most.
    """
    return max(FIRST_STEPS * config.training.learning_rate, LEAST_RANGE)


def has_own_adapters(config: RunConfig) -> bool:
    """Whether every site of a federation ends with an adapter of its own."""
    return bool(config.personal) or config.rounds.last_epochs > 0


def agree_alone(run: str, network: Sam, rank: int) -> Agreement:
    """The agreement of one client without a federation. Its own tensors are the mean, and nothing travels.

    Args:
        run: the run's id.
        network: the network as assembled, before any training.
        rank: the adapters' rank.
    """
    start = trained_state(network)
    return Agreement(run, start, list(start), aggregator("fedavg", rank), Compression(codec="fp32"))


def check_pairs(sites: Sequence[Site]) -> None:
    """Check from the headers alone, before long work begins, that every label map fits its image.

    Raises:
        FlapsamError: a label map does not fit its image.
    """
    for site in sites:
        for case in site.cases:
            check_geometry(case, read_geometry(case.image, modalities=True), read_geometry(case.label))


def with_modalities(config: RunConfig, cases: Sequence[Case]) -> RunConfig:
    """Enter the number of modalities, as read from the cases' headers, in the configuration.

    Raises:
        FlapsamError: the cases differ in their number of modalities.
    """
    counts = {case: count_modalities(case.images) for case in cases}
    first, number = next(iter(counts.items()))
    for case, count in counts.items():
        if count != number:
            raise FlapsamError(
                f"{case.image}: the case has {count} modalities, but {first.image} has {number}; all cases need equally many"
            )
    return config.model_copy(update={"samples": config.samples.model_copy(update={"modalities": number})})


def with_windows(config: RunConfig, network: Sam, known: int | None = None, sharing: int = 1) -> RunConfig:
    """Replace ``micro_batch: auto`` by a number: the one known from earlier in the run, or one measured now.

    Args:
        config: the configuration.
        network: the network, ready to train.
        known: the number from earlier in the run, if any.
        sharing: number of processes that train on the same device.
    """
    if config.training.micro_batch != "auto":
        return config
    windows = known or windows_that_fit(network, config.training, config.precision, sharing=sharing)
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch": windows})})


def prepare_site(
    site: Site,
    config: RunConfig,
    cache: Path,
    on_case: Callable[[], None] = lambda: None,
    ignores_unknown: bool = False,
) -> ClientData:
    """Prepare a site's training and validation cases.

    Args:
        site: the site.
        config: the resolved configuration.
        cache: folder for prepared volumes.
        on_case: called after every case.
        ignores_unknown: whether a label value that belongs to no class is left out of the loss, instead of an error.

    Raises:
        FlapsamError: a case cannot be used.
    """
    labels = replace(label_map(config.data, site.name), ignores_unknown=ignores_unknown)

    def prepared(cases: Sequence[Case]) -> list[PreparedCase]:
        result = []
        for case in cases:
            result.append(prepare(case, labels, config.samples, cache))
            on_case()
        return result

    return ClientData(site.name, prepared(site.of("train")), prepared(site.of("val")))


def card_of(run: str, mode: str, rounds: int, config: RunConfig, origin: Origin) -> AdapterCard:
    """The card that is written beside a run's adapter."""
    return AdapterCard(
        run=run,
        mode=mode,
        rounds=rounds,
        strategy=config.strategy,
        lora=config.lora,
        frozen=config.frozen,
        personal=config.personal,
        # What a site trains for itself at the end has no noise.
        privacy=None if mode == "personal" else config.privacy,
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
