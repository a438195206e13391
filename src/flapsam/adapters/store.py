"""Store and load an adapter: a folder with the trained tensors and everything that is needed to use them.

``flapsam.json`` describes the adapter. Low-rank factors are kept in PEFT's own format (``adapter_config.json``,
``adapter_model.safetensors``), which for FLAP-SAM also holds the decoder's output part. What PEFT cannot express is in
``weights.safetensors``. The model card, ``README.md``, is for people.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flapsam.base.errors import FlapsamError, too_new
from flapsam.base.files import check_file, read_text, write_text, written_whole
from flapsam.base.names import Named, Names
from flapsam.base.version import __version__
from flapsam.run.config import RANDOM, Backbone, Checkpoint, ClassValues, Lora, OutputPart, Privacy, Samples
from flapsam.run.reading import described
from flapsam.sam import Sam, architecture, assemble, load_trained, lora_config, strategy
from flapsam.sam.sources import source
from flapsam.sam.strategies import OUTPUT

CARD, PEFT_CONFIG, PEFT_WEIGHTS, PLAIN_WEIGHTS = (
    "flapsam.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "weights.safetensors",
)
PEFT_PREFIX = "base_model.model."
CARD_FORMAT = 7
"""Version of ``flapsam.json``. ``_upgrade`` converts older ones."""
LARGEST_SIZE = 4096
"""Largest side of the network's input in pixels, and largest rank."""
MOST_CLASSES = 255
"""Largest number of classes, since label maps hold bytes."""


class BackboneCard(BaseModel):
    """The backbone that an adapter belongs to."""

    model_config = ConfigDict(extra="forbid")

    name: str
    pixels: Literal["paper", "sam", "own"]
    weights: str
    """File name of the checkpoint, or ``random``."""
    masks: Literal["new", "warm"]
    seed: int
    """Seed of the weights that the checkpoint did not contain."""
    checksum: str
    """SHA-256 of the frozen weights."""


class AdapterCard(BaseModel):
    """Contents of ``flapsam.json``: the description of an adapter."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[7] = CARD_FORMAT
    flapsam: str = __version__
    run: str
    mode: str
    rounds: int
    strategy: str
    lora: Lora
    frozen: list[OutputPart]
    personal: list[str] = []
    """Patterns of the names of parameters that each site trained for itself."""
    privacy: Privacy | None = None
    """Differential privacy of the patients that the adapter was trained on, if it has any."""
    backbone: BackboneCard
    samples: Samples
    classes: Names
    labels: Named[ClassValues]
    """Values of each class in the training labels. Predictions hold 1, 2, … in the order of ``classes``."""
    licence: str
    """SPDX identifier, or ``unknown``."""


def save_adapter(folder: Path, card: AdapterCard, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter. Its description is written last, so a folder that has one is complete.

    Args:
        folder: the adapter's folder.
        card: the adapter's description.
        tensors: the trained tensors, under the network's public names.
    """
    chosen = strategy(card.strategy)
    output_with_lora = chosen.lora and chosen.trains == (OUTPUT,) and not card.frozen
    peft = {n: t.contiguous() for n, t in tensors.items() if ".lora_" in n or (output_with_lora and fnmatchcase(n, OUTPUT))}
    if chosen.volume or not all(map(chosen.selects, tensors)):
        # Slices meet in adapters that PEFT does not know, or an aggregator also changed the adapted layers' own weights, or
        # more trains than the strategy selects. PEFT must not load only a part of the adapter.
        peft = {}
    plain = {n: t.contiguous() for n, t in tensors.items() if n not in peft}
    if peft:
        config = lora_config(card.lora, architecture(source(card.backbone.name).architecture).depth)
        config.base_model_name_or_path = card.backbone.name
        config.inference_mode = True
        config.modules_to_save = ["output"] if output_with_lora else None
        with written_whole(folder / PEFT_WEIGHTS) as temporary:
            save_file({PEFT_PREFIX + name: tensor for name, tensor in peft.items()}, temporary, metadata={"format": "pt"})
        # Sets have no order. Sorting them writes the same file every time.
        write_text(folder / PEFT_CONFIG, json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted) + "\n")
    if plain:
        with written_whole(folder / PLAIN_WEIGHTS) as temporary:
            save_file(plain, temporary)
    write_text(folder / CARD, card.model_dump_json(indent=2) + "\n")


def read_card(folder: Path) -> AdapterCard:
    """Read the description of an adapter.

    Raises:
        FlapsamError: the folder is not an adapter, or this version does not know its format.
    """
    path = folder / CARD
    try:
        description = json.loads(read_text(path))
    except OSError as error:
        raise FlapsamError(f"{folder}: not an adapter, because {CARD} is missing") from error
    except (ValueError, RecursionError) as error:
        raise FlapsamError(f"{path}: not an adapter's description, because it is not valid JSON") from error
    if problem := too_new(description.get("format") if isinstance(description, dict) else None, CARD_FORMAT):
        raise FlapsamError(f"{path}: {problem}")
    try:
        return AdapterCard.model_validate(_upgrade(description))
    except ValidationError as error:
        raise FlapsamError(
            f"{path}: not an adapter's description that flapsam {__version__} can read: {described(error)}"
        ) from error


def _upgrade(description: Any) -> Any:
    """Convert a description to the current format, one version at a time."""
    if not isinstance(description, dict):
        return description
    backbone = description.get("backbone")
    if description.get("format") == 1:
        # Format 1 had no licence, and its first adapters had null for random weights.
        if isinstance(backbone, dict) and backbone.get("weights") is None:
            backbone = {**backbone, "weights": RANDOM}
        description = {**description, "format": 2, "licence": "unknown", "backbone": backbone}
    if description.get("format") == 2:
        # In format 2, masks always started at random.
        if isinstance(backbone, dict):
            backbone = {**backbone, "masks": "new"}
        description = {**description, "format": 3, "backbone": backbone}
    if description.get("format") == 3:
        # In format 3, every query and value had low-rank factors, and the whole output part was trained.
        description = {**description, "format": 4, "lora": {"rank": description.get("lora_rank")}, "frozen": []}
        description.pop("lora_rank", None)
    if description.get("format") == 4:
        # Until format 4, sam-tiny was the network that is now called sam-tiny-1.
        if isinstance(backbone, dict) and backbone.get("name") == "sam-tiny":
            backbone = {**backbone, "name": "sam-tiny-1"}
            if backbone.get("weights") == "sam-tiny.safetensors":
                backbone["weights"] = "sam-tiny-1.safetensors"
        description = {**description, "format": 5, "backbone": backbone}
    if description.get("format") == 5:
        # In format 5, everything that trained travelled.
        description = {**description, "format": 6, "personal": []}
    if description.get("format") == 6:
        # In format 6, no training was private.
        description = {**description, "format": 7, "privacy": None}
    return description


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the trained tensors of an adapter, under the network's public names.

    Raises:
        FlapsamError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in (folder / PEFT_WEIGHTS, folder / PLAIN_WEIGHTS):
        try:
            if path.exists():
                check_file(path)
                tensors |= {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise FlapsamError(f"{path}: cannot be read; is it truncated?") from error
    if not tensors:
        raise FlapsamError(f"{folder}: the adapter's weights are missing")
    return tensors


def load_adapter(folder: Path, checkpoint: Checkpoint | None = None) -> tuple[Sam, AdapterCard]:
    """Build the network of an adapter and load the adapter into it.

    Args:
        folder: the adapter's folder.
        checkpoint: the backbone's checkpoint; the one that ships or was downloaded if None.

    Raises:
        FlapsamError: the adapter is damaged, or its backbone is missing or is not the one that it was trained on.
    """
    card, tensors = read_card(folder), read_tensors(folder)
    _check_sizes(folder, card, tensors)
    if card.backbone.weights == RANDOM:
        checkpoint = RANDOM
    assembled = assemble(
        Backbone(name=card.backbone.name, weights=checkpoint, pixels=card.backbone.pixels, masks=card.backbone.masks),
        image_size=card.samples.size,
        classes=len(card.classes),
        strategy_name=card.strategy,
        lora=card.lora,
        frozen=card.frozen,
        personal=card.personal,
        seed=card.backbone.seed,
    )
    if assembled.origin.checksum != card.backbone.checksum:
        raise FlapsamError(
            f"{folder}: this adapter belongs to another backbone: {card.backbone.name} from {card.backbone.weights} with "
            f"checksum {card.backbone.checksum[:12]}, not {assembled.origin.checksum[:12]}; pass its checkpoint with "
            "--checkpoint"
        )
    try:
        load_trained(assembled.network, tensors)
    except ValueError as error:
        raise FlapsamError(f"{folder}: the weights do not fit its description: {error}") from error
    return assembled.network, card


def _check_sizes(folder: Path, card: AdapterCard, tensors: Mapping[str, Tensor]) -> None:
    """Check that a network of the described size is plausible, before memory is taken for it."""
    ranks = {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name and tensor.ndim == 2}
    if ranks and ranks != {card.lora.rank}:
        raise FlapsamError(f"{folder}: the weights do not fit its description: they have another rank than {card.lora.rank}")
    if (card.samples.size or 0) > LARGEST_SIZE or len(card.classes) > MOST_CLASSES or card.lora.rank > LARGEST_SIZE:
        raise FlapsamError(f"{folder / CARD}: it describes a network that is far too large; restore the file")
