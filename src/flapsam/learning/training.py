"""One client's local fit: loss, learning rate, epochs."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError
from flapsam.base.files import written_whole
from flapsam.base.prefetch import ahead
from flapsam.base.seeds import seed_for
from flapsam.learning.augmentation import AUGMENTATIONS
from flapsam.learning.features import Features, can_be_kept
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.slices import labels_to_square, to_square
from flapsam.run.config import Samples, Training
from flapsam.sam import Sam, travelling
from flapsam.sites import IGNORED

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Loss:
    """The loss and its two terms, each a scalar."""

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor


def segmentation_loss(logits: Tensor, labels: Tensor, options: Training) -> Loss:
    """Weighted sum of cross-entropy and Dice; voxels labelled −100 take part in neither.

    Dice is the mean over all classes, background among them, of 1 − (2Σpg + ε)/(Σp² + Σg² + ε) with ε = 1e-5, p the softmax,
    g the truth, sums over the batch.

    Args:
        logits: (batch, classes, height, width).
        labels: (batch, height, width), class indices or −100.
        options: the weights of the terms and of foreground in the cross-entropy.
    """
    valid = labels != IGNORED
    if not valid.any():
        nothing = logits.sum() * 0
        return Loss(nothing, nothing, nothing)
    classes = logits.shape[1]
    weight = torch.full((classes,), options.foreground_weight, device=logits.device)
    weight[0] = 1.0
    cross_entropy = F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORED)
    truth = F.one_hot(labels.where(valid, 0), classes).movedim(-1, 1) * valid[:, None]
    predicted = logits.softmax(dim=1) * valid[:, None]
    over = (0, 2, 3)
    overlap, squares = (predicted * truth).sum(over), (predicted**2).sum(over) + truth.sum(over)
    dice = (1 - (2 * overlap + 1e-5) / (squares + 1e-5)).mean()
    return Loss(options.cross_entropy * cross_entropy + options.dice * dice, cross_entropy, dice)


def loss_of(
    forward: Callable[[Tensor], Tensor], batch: Batch, device: torch.device, options: Training, precision: str
) -> Loss:
    """The loss of a batch, which is moved to the device; ``forward`` gives the logits, with ``bf16`` under autocast."""
    images, labels = (tensor.to(device) for tensor in batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = forward(images)
    return segmentation_loss(logits.float(), labels, options)


def learning_rate(step: int, batches_per_epoch: int, options: Training, rounds: int = 1) -> float:
    """The rate that step ``step``, counted from 0 across a client's rounds, uses.

    Linear warm-up to ``learning_rate``, then polynomial decay that would reach zero after ``schedule_epochs`` epochs, or
    at the end of ``rounds`` rounds.
    """
    warmup = options.warmup_steps
    if step <= warmup:
        return options.learning_rate * max(step, 1) / warmup
    if options.schedule_epochs is None:
        length = max(rounds * options.epochs * batches_per_epoch - warmup, 1)
    else:
        length = options.schedule_epochs * batches_per_epoch
    left = 1 - (step - warmup - 1) / length
    return options.learning_rate * max(left, 0.0) ** options.schedule_power


@dataclass(frozen=True)
class FitReport:
    """What one fit did."""

    steps: int
    slices: int
    """Slices that went through the network."""
    loss: float
    """Mean over the steps."""
    cross_entropy: float
    dice_loss: float
    seconds: float
    waiting: float
    """Seconds of these that the network waited for samples."""


FIT_METRICS = ("loss", "cross_entropy", "dice_loss", "steps", "seconds", "waiting")
"""Fields of ``FitReport`` that a site reports to the server, unless its metrics stay at home."""


class Learner:
    """The part of a fit that outlives a round: Adam's moments and the number of steps so far."""

    def __init__(self, network: Sam, options: Training, rounds: int = 1) -> None:
        """Begin to learn.

        Args:
            network: its travelling parameters are what is learned.
            options: of every fit.
            rounds: of the run, for a learning rate that falls until its end.
        """
        self.rounds = rounds
        self.parameters = travelling(network)
        self.options = options
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.steps = 0

    def reset_moments(self) -> None:
        """Forget Adam's moments; the learning rate goes on from the same step."""
        self.optimizer.state.clear()

    def save(self, path: Path) -> None:
        """Write moments and steps, whole or not at all."""
        tensors = {
            f"{key}/{name}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"steps": str(self.steps)})

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote.

        Raises:
            FlapsamError: the file is damaged or belongs to another network.
        """
        try:
            with safe_open(path, framework="pt") as file:
                self.steps = int(file.metadata()["steps"])
                self.reset_moments()
                for entry in file.keys():  # noqa: SIM118 (it is no dictionary)
                    key, name = entry.split("/", 1)
                    parameter = self.parameters[name]
                    state = self.optimizer.state.setdefault(parameter, {})
                    state[key] = file.get_tensor(entry).to(parameter.device)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise FlapsamError(f"{path}: a client's saved state that cannot be read; start the run anew") from error


def batches_per_epoch(cases: Sequence[PreparedCase], options: Training) -> int:
    """Batches in one epoch: every slice that takes part is the middle of one window; the last, smaller batch is kept."""
    occupied = sum(len(case.occupied) for case in cases)
    empty = sum(case.slices for case in cases) - occupied
    return math.ceil((occupied + _empty_shown(occupied, empty, options)) / options.batch_size)


def batches(
    cases: Sequence[PreparedCase],
    options: Training,
    samples: Samples,
    size: int,
    seed: int,
    features: Features | None = None,
) -> Iterator[Batch]:
    """One epoch of windows in random order.

    Yields:
        Images (slices, channels, size, size) in [0, 1], or embeddings (slices, width, tokens, tokens) where ``features`` has
        them, and labels (slices, size, size), the windows' slices side by side.
    """
    rng = np.random.default_rng(seed)
    augment = AUGMENTATIONS[options.augment]
    middles = _middles(cases, options, rng)
    order = rng.permutation(len(middles))
    for start in range(0, len(order), options.batch_size):
        images, labels = [], []
        for index in order[start : start + options.batch_size]:
            case, centre = middles[index]
            if features:
                images.append(torch.from_numpy(features.of(case)[case.indices(centre, options.window)]))
                truth = case.window_labels(centre, options.window)
            else:
                window = case.window(centre, options.window, samples)
                image, truth = augment(window[0], window[1], rng)
                images.append(to_square(image, size, samples.resize))
            labels.append(labels_to_square(truth, size, samples.resize))
        yield torch.cat(images), torch.cat(labels)


def _middles(cases: Sequence[PreparedCase], options: Training, rng: np.random.Generator) -> list[tuple[PreparedCase, int]]:
    """The slices that an epoch shows: those with a class, and of the others a share."""
    every = [(case, centre) for case in cases for centre in range(case.slices)]
    if options.empty_slices == 1:
        return every
    occupied = [(case, centre) for case, centre in every if centre in case.occupied]
    empty = [(case, centre) for case, centre in every if centre not in case.occupied]
    kept = rng.choice(len(empty), _empty_shown(len(occupied), len(empty), options), replace=False)
    return occupied + [empty[index] for index in kept]


def _empty_shown(occupied: int, empty: int, options: Training) -> int:
    """How many of so many empty slices an epoch shows; where all are empty at least one."""
    return max(round(options.empty_slices * empty), 0 if occupied else 1)


def fit(
    network: Sam,
    learner: Learner,
    cases: Sequence[PreparedCase],
    samples: Samples,
    *,
    seed: int,
    precision: str = "fp32",
    on_step: Callable[[], None] = lambda: None,
) -> FitReport:
    """Train the network's travelling parameters for a round's local epochs.

    Args:
        network: holds the parameters that the server sent; changed in place.
        learner: this site's optimizer, changed in place.
        cases: the training cases.
        samples: how volumes become samples.
        seed: of window order and augmentation in this round at this site.
        precision: ``bf16`` runs the network under autocast.
        on_step: called after every step.
    """
    options = learner.options
    per_epoch = batches_per_epoch(cases, options)
    network.train()
    started = time.perf_counter()
    at_once = (options.micro_batch if isinstance(options.micro_batch, int) else options.batch_size) * options.window
    features = Features(network, cases, samples, precision) if can_be_kept(network, options, samples) else None
    forward = network.logits if features else network
    device = network.pixel_mean.device
    trained = [parameter for parameter in learner.parameters.values() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained] if options.proximal else []
    losses: list[Tensor] = []
    slices, waiting = 0, 0.0
    for epoch in range(options.epochs):
        coming = batches(cases, options, samples, network.image_size, seed_for(seed, epoch), features)
        # Where the network has all cores, a thread beside its own costs it more than it waits: a third of the demo's rounds.
        if device.type != "cpu" or torch.get_num_threads() < default_threads():
            coming = ahead(coming)
        while True:
            asked = time.perf_counter()
            batch = next(coming, None)
            waiting += time.perf_counter() - asked
            if batch is None:
                break
            images, labels = batch
            for group in learner.optimizer.param_groups:
                group["lr"] = learning_rate(learner.steps, per_epoch, options, learner.rounds)
            learner.optimizer.zero_grad(set_to_none=True)
            terms = []
            for part in zip(images.split(at_once), labels.split(at_once), strict=True):
                loss, share = loss_of(forward, part, device, options, precision), len(part[0]) / len(images)
                (loss.total * share).backward()
                terms.append(share * torch.stack([loss.total, loss.cross_entropy, loss.dice]).detach())
            losses.append(torch.stack(terms).sum(dim=0))
            if options.proximal:
                _pull_back(trained, start, options.proximal)
            learner.optimizer.step()
            learner.steps += 1
            slices += len(images)
            on_step()
    total, cross_entropy, dice = torch.stack(losses).mean(dim=0).tolist()
    return FitReport(len(losses), slices, total, cross_entropy, dice, time.perf_counter() - started, waiting)


def _pull_back(parameters: Sequence[Tensor], start: Sequence[Tensor], strength: float) -> None:
    """Add to the gradients that of FedProx's term μ/2 · ‖θ − θ_start‖²."""
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=strength)
