"""From a configuration to a network that is ready to train or to predict."""

from collections.abc import Collection
from dataclasses import dataclass

from flapsam.base.errors import FlapsamError
from flapsam.base.seeds import seed_for
from flapsam.run.config import RANDOM, Backbone, Checkpoint, Lora, OutputPart, RunConfig
from flapsam.sam.architecture import architecture
from flapsam.sam.checkpoints import find_checkpoint, infer_architecture, load_checkpoint, read_checkpoint, warm_masks
from flapsam.sam.lora import apply_strategy, frozen_checksum
from flapsam.sam.network import Sam, build
from flapsam.sam.sources import source
from flapsam.sam.strategies import strategy


@dataclass(frozen=True)
class Origin:
    """Where a network's weights come from."""

    checkpoint: Checkpoint
    about: str
    """The same in words."""
    checksum: str
    """SHA-256 of the weights that stay."""


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
    seed: int,
) -> Assembled:
    """Build the backbone, load its weights, add the strategy.

    Args:
        backbone: name, weights and input normalisation.
        image_size: side of the input in pixels; the architecture's default if None.
        classes: without background.
        strategy_name: what trains.
        lora: the adapters, if the strategy has any.
        frozen: parts of the decoder's output that do not train.
        seed: of everything that starts at random.

    Raises:
        FlapsamError: a name is unknown, the size does not fit, or the checkpoint is not to be had or not right.
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
    state, about = None, "random weights, nothing is pretrained"
    if checkpoint != RANDOM:
        state = read_checkpoint(checkpoint)
        actual = infer_architecture(state)
        if actual not in (None, known.architecture):
            raise FlapsamError(f"{checkpoint}: this is a {actual}; set backbone.name to it, it is {backbone.name} now")
        about = f"{checkpoint.name}: {load_checkpoint(network, state, str(checkpoint))}"
    apply_strategy(network, chosen, lora, frozen=frozen, seed=seed_for(seed, "adapters"))
    # Warm masks are all alike, and stay alike where nothing trains that a class has for itself.
    output = network.mask_decoder.output
    apart = [*output.mask_tokens.parameters(), *output.hypernetworks.parameters()]
    if state is not None and backbone.masks == "warm" and any(parameter.requires_grad for parameter in apart):
        warm_masks(network, state)
    return Assembled(network, Origin(checkpoint, f"{backbone.name} with {about}", frozen_checksum(network)))


def assemble_run(config: RunConfig) -> Assembled:
    """The network of a run, as ``assemble`` makes it.

    Raises:
        FlapsamError: as ``assemble``.
    """
    return assemble(
        config.backbone,
        image_size=config.samples.size,
        classes=len(config.data.classes),
        strategy_name=config.strategy,
        lora=config.lora,
        frozen=config.frozen,
        seed=config.seed,
    )
