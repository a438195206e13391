"""From a configuration to a network that is ready to train or to predict."""

from dataclasses import dataclass

from flapsam.config import Backbone
from flapsam.sam.adapters import apply_strategy, frozen_checksum
from flapsam.sam.architecture import architecture
from flapsam.sam.checkpoints import load_weights, read_checkpoint
from flapsam.sam.network import Sam, build
from flapsam.sam.strategies import strategy
from flapsam.seeds import seed_for


@dataclass(frozen=True)
class Assembled:
    """A network, where its weights come from in words, and the checksum of those that stay."""

    network: Sam
    weights: str
    checksum: str


def assemble(
    backbone: Backbone, *, image_size: int | None, classes: int, strategy_name: str, rank: int, seed: int
) -> Assembled:
    """Build the backbone, load its weights, add the strategy.

    Args:
        backbone: name, weights and input normalisation.
        image_size: side of the input in pixels; the architecture's default if None.
        classes: without background.
        strategy_name: what trains.
        rank: of the adapters.
        seed: of everything that starts at random.

    Raises:
        FlapsamError: a name is unknown, the size does not fit, or the checkpoint is not right.
    """
    sizes = architecture(backbone.name)
    chosen = strategy(strategy_name)
    network = build(
        sizes,
        image_size=image_size or sizes.default_size,
        classes=classes,
        pixels=backbone.pixels,
        seed=seed_for(seed, "network"),
    )
    if backbone.weights is None:
        weights = "random weights: nothing is pretrained; give a checkpoint with backbone.weights"
    else:
        report = load_weights(network, read_checkpoint(backbone.weights), str(backbone.weights))
        weights = f"{backbone.weights.name}: {report}"
    apply_strategy(network, chosen, rank=rank, seed=seed_for(seed, "adapters"))
    return Assembled(network, weights, frozen_checksum(network))
