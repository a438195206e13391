"""Pretraining of small backbones on synthetic scenes, which produced the weights that ship with flapsam.

Scenes are generated on the fly. Step ``n`` of a seed always sees the same scenes, so an interrupted run
continues as if it had never stopped.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flapsam.base.device import set_up_torch
from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError
from flapsam.base.files import check_writable, write_text, written_whole
from flapsam.base.seeds import seed_for
from flapsam.experiments.synthesis import TASKS, Scenes, draw_scenes
from flapsam.experiments.teaching import Teacher
from flapsam.run.observer import Observer
from flapsam.sam import Sam, architecture, build
from flapsam.sam.tiny_vit import ConvNorm

HELD_OUT = 128
"""Number of scenes that are only scored."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, except the number of threads."""

    steps: int = 10_000
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 300
    decay: float = 0.8
    """Fraction of the steps, at the end, over which the learning rate falls to zero."""
    seed: int = 0
    backbone: str = "sam-tiny"
    size: int = 128
    precision: str = "fp32"
    """Precision of the network's arithmetic. With ``bf16`` it runs under autocast, which many processors only emulate."""
    teacher: str = ""
    """Name of a backbone whose embeddings the network learns, too; empty for none."""
    teaching: float = 1.0
    """Weight of the teacher's loss beside that of the masks."""
    taught: int = 4
    """Number of the batch's scenes that the teacher sees, because it is much slower than its student."""


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate at a step: linear warm-up, then constant, then linear decay to zero."""
    rise = min((step + 1) / recipe.warmup, 1.0)
    left = (recipe.steps - step) / max(recipe.decay * recipe.steps, 1)
    return recipe.learning_rate * min(rise, left, 1.0)


def pretext_loss(outputs: Tensor, scenes: Scenes) -> Tensor:
    """Loss of the masks and of the regions' intensity levels.

    The masks' loss is the mean over the tasks of balanced binary cross-entropy + 1 − Dice, with Dice's sums taken over the
    batch. Foreground and background weigh the same in the cross-entropy, because without weights a network trained from
    scratch predicted background everywhere. The levels' loss is the mean squared error after standardising each scene. The
    network learns the levels within a hundred steps, which helps it to learn the masks.

    Args:
        outputs: the masks' logits, then the levels: (batch, tasks + 1, size, size).
        scenes: the true masks and levels.
    """
    logits, levels, masks = outputs[:, :-1], outputs[:, -1], scenes.masks
    share = masks.mean(dim=(0, 2, 3), keepdim=True)
    weight = 0.5 * (masks / (share + 1e-3) + (1 - masks) / (1 - share + 1e-3))
    entropy = F.binary_cross_entropy_with_logits(logits, masks, weight)
    predicted = logits.sigmoid()
    overlap = (predicted * masks).sum(dim=(0, 2, 3))
    total = (predicted**2 + masks**2).sum(dim=(0, 2, 3))
    true_levels = scenes.levels - scenes.levels.mean(dim=(1, 2), keepdim=True)
    true_levels = true_levels / (true_levels.std(dim=(1, 2), keepdim=True) + 0.05)
    return entropy + 1 - ((2 * overlap + 1) / (total + 1)).mean() + F.mse_loss(levels, true_levels)


@torch.inference_mode()
def held_out_iou(network: Sam, recipe: Recipe) -> dict[str, float]:
    """IoU of each task's mask over all pixels of the held-out scenes, and the ``mean`` over the tasks."""
    network.eval()
    intersections = torch.zeros(len(TASKS))
    unions = torch.zeros(len(TASKS))
    for part in range(HELD_OUT // 16):
        scenes = held_out(recipe, part)
        predicted = network(scenes.images)[:, :-1] > 0
        truth = scenes.masks > 0.5
        intersections += (predicted & truth).sum(dim=(0, 2, 3))
        unions += (predicted | truth).sum(dim=(0, 2, 3))
    network.train()
    scores = (intersections / unions.clamp(min=1)).tolist()
    return {**dict(zip(TASKS, scores, strict=True)), "mean": sum(scores) / len(scores)}


def held_out(recipe: Recipe, part: int) -> Scenes:
    """Sixteen scenes that no training step sees."""
    draw = torch.Generator().manual_seed(seed_for(recipe.seed, "held out", part))
    return draw_scenes(16, recipe.size, draw)


def pretrain(
    folder: Path,
    recipe: Recipe,
    *,
    command: str,
    threads: int | None = None,
    resume: bool = False,
    every: int = 500,
    observer: Observer | None = None,
) -> dict[str, float]:
    """Train on synthetic scenes and write ``weights.safetensors`` (fp16) and ``log.jsonl`` into ``folder``.

    Args:
        folder: the output folder. It also holds ``state.safetensors``, which ``resume`` reads.
        recipe: the hyperparameters.
        command: the command that repeats this pretraining, stored in the weights' metadata.
        threads: number of threads; all cores if None.
        resume: whether to continue from the folder's saved state.
        every: number of steps between scores, at which the state is saved, too.
        observer: follows the steps.

    Returns:
        IoU of each task on held-out scenes, and their mean.

    Raises:
        FlapsamError: the folder cannot be written, there is nothing to resume, or the teacher is not on this machine.
    """
    observer = observer or Observer()
    check_writable(folder)
    set_up_torch(threads or default_threads(), deterministic=True)
    network = build(architecture(recipe.backbone), image_size=recipe.size, classes=len(TASKS), seed=recipe.seed)
    for module in network.modules():
        if isinstance(module, ConvNorm):
            module.learns_statistics = True
    teacher = Teacher(recipe.teacher, network) if recipe.teacher else None
    trained = [p for name, p in network.named_parameters() if not name.startswith("prompt_encoder.") or "no_mask" in name]
    if teacher:
        network.add_module("compared", teacher.compared)
        trained += teacher.compared.parameters()
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    state, log = folder / "state.safetensors", folder / "log.jsonl"
    start, spent = _load(state, network, optimizer, recipe) if resume else (0, 0.0)
    scores = held_out_iou(network, recipe)
    if start == 0:
        write_text(log, json.dumps({"step": 0, "seconds": 0.0, "iou": scores}) + "\n")
    began = time.perf_counter() - spent
    observer.begin("pretraining", recipe.steps, start)
    losses: list[float] = []
    lessons: list[float] = []
    for step in range(start, recipe.steps):
        draw = torch.Generator().manual_seed(seed_for(recipe.seed, "scenes", step))
        scenes = draw_scenes(recipe.batch, recipe.size, draw)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            embedding = network.embed(scenes.images)
            outputs = network.logits(embedding)
        loss = pretext_loss(outputs.float(), scenes)
        if teacher:
            taught = teacher.loss(embedding[: recipe.taught].float(), scenes.images[: recipe.taught])
            lessons.append(taught.item())
            loss = loss + recipe.teaching * taught
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        observer.step()
        done = step + 1
        if done % every == 0 or done == recipe.steps:
            scores = held_out_iou(network, recipe)
            spent = time.perf_counter() - began
            entry = {"step": done, "seconds": round(spent, 1), "loss": sum(losses) / len(losses), "iou": scores}
            if lessons:
                entry["teacher's loss"] = sum(lessons) / len(lessons)
            losses.clear()
            lessons.clear()
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            observer.say(f"step {done}: loss {entry['loss']:.3f}, held-out IoU {scores['mean']:.3f}, {spent:.0f} s")
            _save(state, network, optimizer, done, spent, recipe)
            _export(folder / "weights.safetensors", network, recipe, command, done, spent, scores)
    observer.end()
    return scores


def _save(path: Path, network: Sam, optimizer: torch.optim.Optimizer, step: int, seconds: float, recipe: Recipe) -> None:
    tensors = {f"weight/{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    metadata = {"step": str(step), "seconds": str(seconds), "recipe": json.dumps(asdict(recipe))}
    with written_whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def _load(path: Path, network: Sam, optimizer: torch.optim.Optimizer, recipe: Recipe) -> tuple[int, float]:
    parameters = dict(network.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["recipe"]) != asdict(recipe):
                raise FlapsamError(f"{path}: was started with another recipe; use the same options to resume it")
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FlapsamError(f"{path}: no pretraining to resume here; leave out --resume") from error
    network.load_state_dict({n.removeprefix("weight/"): t for n, t in entries.items() if n.startswith("weight/")})
    for entry, tensor in entries.items():
        key, name = entry.split("/", 1)
        if key != "weight":
            optimizer.state.setdefault(parameters[name], {})[key] = tensor
    return int(metadata["step"]), float(metadata["seconds"])


def _export(
    path: Path, network: Sam, recipe: Recipe, command: str, step: int, seconds: float, scores: dict[str, float]
) -> None:
    """Write the weights in half precision, with metadata that say how they were trained."""
    metadata = {
        "command": command,
        "recipe": json.dumps(asdict(recipe)),
        "steps": str(step),
        "seconds": f"{seconds:.0f}",
        "held_out_iou": json.dumps({task: round(value, 4) for task, value in scores.items()}),
        "tasks": json.dumps(TASKS),
        "data": f"synthetic images, and {recipe.teacher}'s embeddings of them"
        if recipe.teacher
        else "synthetic images only",
    }
    state = network.state_dict()
    tensors = {name: tensor.half().contiguous() for name, tensor in state.items() if not name.startswith("compared.")}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
