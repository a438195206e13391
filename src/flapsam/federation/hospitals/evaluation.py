"""A run between hospitals that trains nothing: the sites score finished adapters on their own test cases."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from flapsam.adapters.store import AdapterCard, read_card, read_tensors
from flapsam.adapters.trained import Trained, find_trained
from flapsam.base.errors import FlapsamError
from flapsam.base.files import written_whole
from flapsam.federation.packets import checksum
from flapsam.run.config import Checkpoint, Rounds, RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.reading import validated
from flapsam.sam import strategy

MOST_ADAPTERS = 8
"""Largest number of adapters in an evaluation, and of answers with test scores in a run."""
NOTES = "Test of "
"""How an evaluation's notes begin, before the names of its adapters."""
SAME = ("strategy", "lora", "frozen", "backbone", "samples", "classes", "labels")
"""What adapters that are evaluated together must share, so that they are tensors of the same network."""


def evaluation_of(
    paths: Sequence[Path],
    output: Path,
    sites: Sequence[str] | None = None,
    checkpoint: Checkpoint | None = None,
) -> RunConfig:
    """The configuration of an evaluation.

    Args:
        paths: folders of runs or adapters. The first one is what the others are compared with.
        output: folder for the evaluation.
        sites: the sites to ask; all if None.
        checkpoint: the backbone's checkpoint, if it is not where the first adapter's run found it.

    Raises:
        FlapsamError: an adapter cannot be read, or they are not adapters of the same network.
    """
    found = [find_trained(path) for path in paths]
    if len(found) > MOST_ADAPTERS:
        raise FlapsamError(f"an evaluation compares at most {MOST_ADAPTERS} adapters, and {len(found)} are given")
    cards = [read_card(trained.folder) for trained in found]
    for trained, card in zip(found, cards, strict=True):
        different = [field for field in SAME if _field(card, field) != _field(cards[0], field)]
        if different:
            raise FlapsamError(
                f"{trained.folder}: its {different[0]} is not that of {found[0].folder}; evaluate them one at a time"
            )
    tree = _tree(found[0], cards[0])
    nothing: dict[str, Any] = {"privacy": None, "secure": False, "personal": [], "site_ranks": {}, "notes": _notes(found)}
    rounds = {
        "count": 0,
        "min_sites": 1,
        "require": 1,
        "deadline": (found[0].run.rounds if found[0].run else Rounds()).deadline,
    }
    tree |= nothing | {"output": output, "rounds": rounds, "compression": {"codec": "fp32"}}
    data = {"path": "/", "table": None, "simulated_sites": None, "training_cases": None}
    tree |= {"modes": ["federated"], "data": {**tree["data"], **data, "sites": list(sites) if sites else None}}
    if checkpoint or found[0].checkpoint:
        tree["backbone"] = {**tree["backbone"], "weights": checkpoint or found[0].checkpoint}
    return validated(tree, RunConfig, str(found[0].folder))


def begin(paths: Sequence[Path], config: RunConfig) -> None:
    """Begin an evaluation in its folder, unless it has begun, and keep the adapters' tensors there.

    Args:
        paths: folders of runs or adapters.
        config: the evaluation's resolved configuration.

    Raises:
        FlapsamError: the folder holds another run, or an adapter cannot be read.
    """
    folder = RunFolder(config.output)
    if folder.is_begun:
        folder.resume(config)
    else:
        folder.begin(config)
    for number, path in enumerate(paths, start=1):
        target, tensors = _adapter(folder, number), _shared(find_trained(path).folder)
        if not target.exists():
            with written_whole(target) as temporary:
                save_file(tensors, temporary)
        elif checksum(load_file(target)) != checksum(tensors):
            raise FlapsamError(f"{config.output}: holds the evaluation of another adapter {number}; choose another output")


def adapters_of(folder: RunFolder) -> list[Path]:
    """The files with the tensors of an evaluation's adapters, in their order."""
    return sorted((folder.state / "adapters").glob("[0-9]*.safetensors"))


def tensors_for(path: Path, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read an adapter's tensors as the sites' network has them.

    Args:
        path: a file of ``adapters_of``.
        start: the network's own tensors, which say the names and shapes.

    Raises:
        FlapsamError: the adapter lacks a tensor of the network.
    """
    tensors = load_file(path)
    for name, tensor in start.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise FlapsamError(
                f"{path}: the adapter does not fit the network of its description; {name} is missing or differs"
            )
    if extra := sorted(tensors.keys() - start.keys()):
        raise FlapsamError(f"{path}: the adapter has {extra[0]}, which does not travel; name its run's folder")
    return {name: tensors[name].float() for name in start}


def names_of(config: RunConfig) -> list[str]:
    """The names of an evaluation's adapters."""
    return config.notes.removeprefix(NOTES).split(", ") if config.notes.startswith(NOTES) else []


def _shared(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors without those that each site has trained for itself, which are as they started."""
    card, tensors = read_card(folder), read_tensors(folder)
    chosen = strategy(card.strategy)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if chosen.selects(name) or not any(fnmatchcase(name, pattern) for pattern in card.personal)
    }


def _field(card: AdapterCard, name: str) -> Any:
    """What a card says of the network. The seed has no part in it, because all that starts at random is replaced."""
    value = getattr(card, name)
    return value.model_dump(exclude={"seed"}) if name == "backbone" else value


def _notes(found: Sequence[Trained]) -> str:
    names = [_name(trained.folder) for trained in found]
    repeated = len(set(names)) < len(names)
    return NOTES + ", ".join(f"{number} {name}" if repeated else name for number, name in enumerate(names, start=1))


def _name(folder: Path) -> str:
    """The name of an adapter's run, or that of the adapter's folder."""
    folder = folder.resolve()
    return (folder.parent if folder.name == "adapter" else folder).name.replace(",", "")


def _adapter(folder: RunFolder, number: int) -> Path:
    return folder.state / "adapters" / f"{number:06d}.safetensors"


def _tree(trained: Trained, card: AdapterCard) -> dict[str, Any]:
    if trained.run:
        return trained.run.model_dump()
    backbone = {"name": card.backbone.name, "pixels": card.backbone.pixels, "masks": card.backbone.masks}
    return {
        "preset": "paper",
        "seed": card.backbone.seed,
        "data": {"path": "/", "labels": card.labels},
        "backbone": backbone,
        "aggregator": "fedavg",
        **{field: getattr(card, field) for field in ("samples", "strategy", "lora", "frozen")},
    }
