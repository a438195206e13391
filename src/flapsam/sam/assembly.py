"""Building the network of a configuration, ready for training or prediction."""

from collections.abc import Collection
from dataclasses import dataclass

from flapsam.base.errors import FlapsamError
from flapsam.base.seeds import seed_for
from flapsam.run.config import RANDOM, Backbone, Checkpoint, Lora, OutputPart, RunConfig
from flapsam.sam.checkpoints import find_checkpoint, load_checkpoint, read_checkpoint, warm_masks
from flapsam.sam.families import architecture, infer_architecture
from flapsam.sam.lora import apply_strategy, frozen_checksum
from flapsam.sam.network import Sam, build
from flapsam.sam.sources import source
from flapsam.sam.strategies import strategy


@dataclass(frozen=True)
class Origin:
    """Where a network's weights come from."""

    checkpoint: Checkpoint
    about: str
    """Backbone and loaded tensors in one line, for the user."""
    checksum: str
    """SHA-256 of the weights that neither train nor travel."""


@dataclass(frozen=True)
class Assembled:
    """A network and where its weights come from."""

    network: Sam
    origin: Origin


def assemble(
    backbone: Backbone,
    *,
    image_size: int | None,
    classes: int,
    strategy_name: str,
    lora: Lora,
    frozen: Collection[OutputPart] = (),
    personal: Collection[str] = (),
    seed: int,
) -> Assembled:
    """Build the backbone, load its weights and apply the strategy.

    Args:
        backbone: name, weights and input normalisation of the backbone.
        image_size: side of the input in pixels; None for the architecture's default.
        classes: number of classes, without the background.
        strategy_name: name of the strategy, which decides what trains.
        lora: the configuration of the adapters, if the strategy has any.
        frozen: parts of the decoder's output that do not train.
        personal: patterns of the names of parameters that train but never travel.
        seed: seed of all random initial weights.

    Raises:
        FlapsamError: a name is unknown, the image size does not fit, or the checkpoint is missing or wrong.
    """
    known = source(backbone.name)
    sizes = architecture(known.architecture)
    chosen = strategy(strategy_name)
    network = build(
        sizes,
        image_size=image_size or sizes.default_size,
        classes=classes,
        pixels=known.pixels if backbone.pixels == "own" else backbone.pixels,
        seed=seed_for(seed, "network"),
    )
    checkpoint = find_checkpoint(backbone)
    state, weights = None, "random weights (not pretrained)"
    if checkpoint != RANDOM:
        state = read_checkpoint(checkpoint)
        actual = infer_architecture(state)
        if actual not in (None, known.architecture):
            raise FlapsamError(f"{checkpoint}: this is a {actual}, not a {backbone.name}; set backbone.name to {actual}")
        weights = f"{checkpoint.name}: {load_checkpoint(network, state, str(checkpoint))}"
    apply_strategy(network, chosen, lora, frozen=frozen, personal=personal, seed=seed_for(seed, "adapters"))
    # Warm masks start out identical, and would stay so if no part specific to a class trained.
    output = network.mask_decoder.output
    per_class = [*output.mask_tokens.parameters(), *output.hypernetworks.parameters()]
    if state is not None and backbone.masks == "warm" and any(parameter.requires_grad for parameter in per_class):
        warm_masks(network, state)
    return Assembled(network, Origin(checkpoint, f"{backbone.name} with {weights}", frozen_checksum(network)))


def assemble_run(config: RunConfig) -> Assembled:
    """Build the network of a run with ``assemble``.

    Raises:
        FlapsamError: as in ``assemble``.
    """
    return assemble(
        config.backbone,
        image_size=config.samples.size,
        classes=len(config.data.classes),
        strategy_name=config.strategy,
        lora=config.lora,
        frozen=config.frozen,
        personal=config.personal,
        seed=config.seed,
    )
