"""A client's local fit: loss, learning rate and epochs."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flapsam.base.device import beside, lent, sample_device
from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError
from flapsam.base.files import written_whole
from flapsam.base.prefetch import called_ahead
from flapsam.base.seeds import seed_for
from flapsam.learning.augmentation import AUGMENTATIONS, ON_SMALLER, ONE_BY_ONE
from flapsam.learning.cuda_graph import WORTH, Batch, Pass, captured
from flapsam.learning.features import Features, can_be_kept
from flapsam.learning.prepared import Middle, PreparedCase, window_labels
from flapsam.learning.slices import CPU, at_once, inner_size, labels_to_square, padded, resized, resized_labels, windows
from flapsam.run.config import Rounds, Samples, Training
from flapsam.sam import Sam, trained
from flapsam.sam.halving import halved
from flapsam.sites import IGNORED


@dataclass(frozen=True)
class Loss:
    """The loss and its two terms, each a scalar."""

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor


def segmentation_loss(logits: Tensor, labels: Tensor, options: Training) -> Loss:
    """Weighted sum of cross-entropy and Dice loss. Both ignore voxels labelled −100.

    The Dice loss is the mean over all classes, including background, of 1 − (2Σpg + ε)/(Σp² + Σg² + ε). Here, ε is 1e-5, p
    is the softmax and g the truth, and sums run over the batch.

    Args:
        logits: logits (batch, classes, height, width).
        labels: class indices or −100 (batch, height, width).
        options: training options, with the weights of both terms and of the foreground in the cross-entropy.
    """
    valid = (labels != IGNORED)[:, None]
    classes = torch.arange(logits.shape[1], device=logits.device)
    # A voxel that is ignored has no class. CUDA has no deterministic kernel for PyTorch's own cross-entropy, and asking
    # whether any voxel is valid would wait for the device.
    truth = (labels[:, None] == classes[:, None, None]).to(logits.dtype)
    weight = torch.where(classes == 0, 1.0, options.foreground_weight)
    log_softmax = logits.log_softmax(dim=1)
    over = (0, 2, 3)
    size = truth.sum(over)
    likelihood = (log_softmax * truth).sum(over)
    cross_entropy = -(weight * likelihood).sum() / (weight * size).sum().clamp(min=torch.finfo(logits.dtype).tiny)
    predicted = log_softmax.exp() * valid
    overlap, squares = (predicted * truth).sum(over), (predicted**2).sum(over) + size
    dice = (1 - (2 * overlap + 1e-5) / (squares + 1e-5)).mean()
    return Loss(options.cross_entropy * cross_entropy + options.dice * dice, cross_entropy, dice)


def loss_of(
    forward: Callable[[Tensor], Tensor], batch: Batch, device: torch.device, options: Training, precision: str
) -> Loss:
    """Move a batch to the device and compute its loss. ``forward`` returns the logits, under autocast for ``bf16``."""
    images, labels = (tensor.to(device) for tensor in batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = forward(images)
    return segmentation_loss(logits.float(), labels, options)


def backward(
    forward: Callable[[Tensor], Tensor],
    batch: Batch,
    device: torch.device,
    options: Training,
    precision: str,
    windows: int,
) -> Tensor:
    """Add the gradients of a batch's loss to the parameters' gradients.

    Args:
        forward: returns the logits of images.
        batch: images and labels, as ``batches`` yields them.
        device: device of the network.
        options: training options. With ``micro_batch``, as many windows pass through the network at once.
        precision: ``bf16`` runs the network under autocast.
        windows: number of windows in a whole batch.

    Returns:
        The loss, the cross-entropy and the Dice loss, a tensor of shape (3,).
    """
    at_once = (options.micro_batch if isinstance(options.micro_batch, int) else windows) * options.window
    terms = []
    for part in zip(*(tensor.split(at_once) for tensor in batch), strict=True):
        loss, share = loss_of(forward, part, device, options, precision), len(part[0]) / len(batch[0])
        (loss.total * share).backward()
        terms.append(share * torch.stack([loss.total, loss.cross_entropy, loss.dice]).detach())
    return torch.stack(terms).sum(dim=0)


ONE_ROUND = Rounds(count=1)
MOST_LOADERS = 2
"""Threads that make batches for a GPU, at most. They take turns in Python: four are no faster (``benchmarks/gpu.py``)."""


def learning_rate(step: int, batches_per_epoch: int, options: Training, rounds: Rounds = ONE_ROUND) -> float:
    """Learning rate of step ``step``, which counts from 0 across a client's rounds.

    The rate warms up linearly to ``learning_rate``, then decays polynomially. It would reach zero after ``schedule_epochs``
    epochs or, if that is not set, at the end of the run's rounds.
    """
    warmup = options.warmup_steps
    if step <= warmup:
        return options.learning_rate * max(step, 1) / warmup
    if options.schedule_epochs is None:
        length = max(rounds.count * _steps(batches_per_epoch, options, rounds) - warmup, 1)
    else:
        length = options.schedule_epochs * batches_per_epoch
    remaining = 1 - (step - warmup - 1) / length
    return options.learning_rate * max(remaining, 0.0) ** options.schedule_power


@dataclass(frozen=True)
class FitReport:
    """Steps, losses and times of one fit."""

    steps: int
    slices: int
    """Number of slices that passed through the network."""
    loss: float
    """Mean loss over the steps."""
    cross_entropy: float
    """Mean cross-entropy over the steps, before the two terms are weighted."""
    dice_loss: float
    """Mean Dice loss over the steps, before the two terms are weighted."""
    seconds: float
    """Seconds that the fit took."""
    waiting: float
    """Seconds of the fit during which the network waited for samples."""


FIT_METRICS = ("loss", "cross_entropy", "dice_loss", "steps", "seconds", "waiting")
"""Fields of ``FitReport`` that a site reports to the server, unless it keeps its metrics to itself."""


class Learner:
    """Training state of a client that outlives a round: Adam's moments and the number of steps so far."""

    def __init__(self, network: Sam, options: Training, rounds: Rounds = ONE_ROUND) -> None:
        """Create the optimizer.

        Args:
            network: the network.
            options: training options of every fit.
            rounds: the rounds of the run, which say how many steps a fit takes and when the learning rate ends.
        """
        self.rounds = rounds
        self.parameters = trained(network)
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
        """Clear Adam's moments. The learning rate continues from the same step."""
        self.optimizer.state.clear()

    def save(self, path: Path) -> None:
        """Write the moments and the number of steps to ``path``, whole or not at all."""
        tensors = {
            f"{key}/{name}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"steps": str(self.steps)})

    def load(self, path: Path) -> None:
        """Restore the state that ``save`` wrote.

        Raises:
            FlapsamError: the file is damaged or belongs to another network.
        """
        try:
            with safe_open(path, framework="pt") as file:
                self.steps = int(file.metadata()["steps"])
                self.reset_moments()
                for entry in file.keys():  # noqa: SIM118 (the file is not a dictionary)
                    key, name = entry.split("/", 1)
                    parameter = self.parameters[name]
                    state = self.optimizer.state.setdefault(parameter, {})
                    state[key] = file.get_tensor(entry).to(parameter.device)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise FlapsamError(f"{path}: cannot read the client's saved state; start a new run") from error


def steps_a_round(cases: Sequence[PreparedCase], options: Training, rounds: Rounds) -> int:
    """Number of training steps of a client in a round."""
    return _steps(batches_per_epoch(cases, options), options, rounds)


def _steps(batches_per_epoch: int, options: Training, rounds: Rounds) -> int:
    return rounds.steps or options.epochs * batches_per_epoch


def batches_per_epoch(cases: Sequence[PreparedCase], options: Training) -> int:
    """Number of batches in an epoch.

    Every slice that the epoch shows is the centre of one window. The last, smaller batch counts, too.
    """
    return math.ceil(_windows(cases, options) / options.batch_size)


def _windows(cases: Sequence[PreparedCase], options: Training) -> int:
    """Number of windows that an epoch shows."""
    occupied = sum(len(case.occupied) for case in cases)
    empty = sum(case.slices for case in cases) - occupied
    return occupied + _empty_shown(occupied, empty, options)


def batches(
    cases: Sequence[PreparedCase],
    options: Training,
    samples: Samples,
    size: int,
    seed: int,
    features: Features | None = None,
    first: int = 0,
    device: torch.device = CPU,
) -> Iterator[Callable[[], Batch]]:
    """Draw one epoch of windows, in random order.

    Every batch has a generator of its own, so that it is the same whichever thread makes it, and whatever came before.

    Args:
        cases: the training cases.
        options: training options.
        samples: how volumes become samples.
        size: side of the network's square input in pixels.
        seed: seed of order and augmentation.
        features: embeddings of the cases, which take the place of images.
        first: number of batches to leave out at the beginning.
        device: device of the batches.

    Yields:
        Functions that cut and augment a batch: images (slices, channels, size, size) in [0, 1] or embeddings (slices, width,
        tokens, tokens), and labels (slices, size, size). The slices of a batch's windows follow one another.
    """
    rng = np.random.default_rng(seed)
    every = middles(cases, options, rng)
    order = rng.permutation(len(every))
    for number in range(first, math.ceil(len(order) / options.batch_size)):
        start = number * options.batch_size
        shown = [every[index] for index in order[start : start + options.batch_size]]
        yield partial(_seeded, [seed, number], shown, options, samples, size, features, device)


def _seeded(
    seed: Sequence[int], shown: Sequence[Middle], options: Training, samples: Samples, size: int, *rest: Any
) -> Batch:
    return batch_of(shown, options, samples, size, np.random.default_rng(seed), *rest)


def batch_of(
    shown: Sequence[Middle],
    options: Training,
    samples: Samples,
    size: int,
    rng: np.random.Generator,
    features: Features | None = None,
    device: torch.device = CPU,
) -> Batch:
    """Cut and augment windows on a device.

    Args:
        shown: the windows, each as its case and its middle slice.
        options: training options.
        samples: how volumes become samples.
        size: side of the network's square input in pixels.
        rng: source of the augmentation.
        features: embeddings of the cases, which take the place of images.
        device: device of the batch.

    Returns:
        Images and labels, as the functions of ``batches`` return them.
    """
    parts = _parts(shown, options, device)
    images, labels = [], []
    with beside(device):
        for numbers in parts:
            alike = [shown[number] for number in numbers]
            truth = window_labels(alike, options.window, device)
            if features:
                kept = [features.of(case)[case.indices(centre, options.window)] for case, centre in alike]
                image = torch.from_numpy(np.stack(kept)).to(device)
                truth = labels_to_square(truth.flatten(0, 1), size, samples.resize).unflatten(0, truth.shape[:2])
            else:
                cut = windows([(case.stack(samples), centre) for case, centre in alike], options.window, device)
                image, truth = _augmented(cut, truth, options, samples, size, rng)
            images.append(image)
            labels.append(truth)
        whole = torch.cat(images), torch.cat(labels)
        order = np.argsort(np.concatenate(parts))
        if (np.diff(order) < 0).any():
            whole = whole[0][order], whole[1][order]
        return lent(whole[0].flatten(0, 1)), lent(whole[1].flatten(0, 1))


def _parts(shown: Sequence[Middle], options: Training, device: torch.device) -> list[list[int]]:
    """The numbers of the windows that are cut at once: of one shape, and on a CPU no more than its cache holds."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, (case, _) in enumerate(shown):
        alike.setdefault(case.labels().shape[1:], []).append(number)
    parts = []
    for shape, numbers in alike.items():
        most = 1 if options.augment in ONE_BY_ONE else at_once(shape, options.window, device)
        parts += [numbers[start : start + most] for start in range(0, len(numbers), most)]
    return parts


def _augmented(
    images: Tensor, labels: Tensor, options: Training, samples: Samples, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Augment windows and resize them to the network's square, whichever comes first."""
    shape, change = labels.shape[-2:], AUGMENTATIONS[options.augment]
    inner = inner_size(shape, size, samples.resize)
    smaller_first = options.augment in ON_SMALLER and math.prod(inner) < math.prod(shape)

    def square(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        whole = resized(images.flatten(0, 1), inner), resized_labels(labels.flatten(0, 1), inner)
        return tuple(part.unflatten(0, labels.shape[:2]) for part in whole)  # pyright: ignore[reportReturnType]

    images, labels = change(*square(images, labels), rng) if smaller_first else square(*change(images, labels, rng))
    return padded(images, size), padded(labels, size, IGNORED)


def middles(cases: Sequence[PreparedCase], options: Training, rng: np.random.Generator) -> list[Middle]:
    """The slices that an epoch shows: all slices with a class, and a random part of the others.

    Args:
        cases: the training cases.
        options: training options, whose ``empty_slices`` is the share of slices without a class.
        rng: draws this share.
    """
    every = [(case, centre) for case in cases for centre in range(case.slices)]
    if options.empty_slices == 1:
        return every
    occupied = [(case, centre) for case, centre in every if centre in case.occupied]
    empty = [(case, centre) for case, centre in every if centre not in case.occupied]
    kept = rng.choice(len(empty), _empty_shown(len(occupied), len(empty), options), replace=False)
    return occupied + [empty[index] for index in kept]


def _empty_shown(occupied: int, empty: int, options: Training) -> int:
    """Number of empty slices that an epoch shows, at least one if no slice is occupied."""
    return max(round(options.empty_slices * empty), 0 if occupied else 1)


def fit(
    network: Sam,
    learner: Learner,
    cases: Sequence[PreparedCase],
    samples: Samples,
    *,
    seed: int,
    precision: str = "fp32",
    loaders: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> FitReport:
    """Train the network's trainable parameters for a round's local epochs or, if the rounds count in steps, for these.

    A round of whole epochs draws its own order. A round of steps continues the epoch that the learner's steps so far have
    reached, so that every slice has its turn, however short the rounds are.

    Args:
        network: the network with the parameters that the server sent. It is changed in place.
        learner: the site's training state. It is changed in place.
        cases: the training cases.
        samples: how volumes become samples.
        seed: seed of window order and augmentation at this site, of this round or, if rounds count in steps, of the run.
        precision: ``bf16`` runs the network under autocast.
        loaders: number of threads that make batches while the network trains. The result does not depend on it. Without a
            number, it follows from the device.
        on_step: called after every step.
    """
    options = learner.options
    per_epoch = batches_per_epoch(cases, options)
    network.train()
    started = time.perf_counter()
    features = Features(network, cases, samples, precision) if can_be_kept(network, options, samples) else None
    forward = network.logits if features else partial(network, depth=options.window)
    device = network.pixel_mean.device
    moving = [parameter for parameter in learner.parameters.values() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in moving] if options.proximal else []
    losses: list[Tensor] = []
    slices, waiting = 0, 0.0
    epoch, first = divmod(learner.steps, per_epoch) if learner.rounds.steps else (0, 0)
    end = learner.steps + _steps(per_epoch, options, learner.rounds)
    making = sample_device(device)
    loaders = default_loaders(device) if loaders is None else loaders
    under_way: deque[torch.cuda.Event] = deque()

    def work(batch: Batch) -> Tensor:
        return backward(forward, batch, device, options, precision, options.batch_size)

    step_of_batch = work if device.type != "cuda" or options.checkpointing else None
    with halved(network, precision):
        while learner.steps < end:
            calls = batches(cases, options, samples, network.image_size, seed_for(seed, epoch), features, first, making)
            calls = islice(calls, end - learner.steps)
            if step_of_batch is None:
                sizes = _sizes(_windows(cases, options), options)
                parameters = list(learner.parameters.values())
                calls, step_of_batch = _with_graph(calls, work, parameters, end - learner.steps, sizes)
            upcoming = called_ahead(calls, loaders) if loaders else (call() for call in calls)
            while True:
                asked = time.perf_counter()
                batch = next(upcoming, None)
                waiting += time.perf_counter() - asked
                if batch is None:
                    break
                for group in learner.optimizer.param_groups:
                    group["lr"] = learning_rate(learner.steps, per_epoch, options, learner.rounds)
                learner.optimizer.zero_grad(set_to_none=True)
                losses.append(step_of_batch(batch))
                if options.proximal:
                    pull_back(moving, start, options.proximal)
                learner.optimizer.step()
                learner.steps += 1
                slices += len(batch[0])
                if device.type == "cuda":
                    wait_for_earlier(under_way, device)
                on_step()
            epoch, first = epoch + 1, 0
    if device.type == "cuda":
        # Gradients would keep the memory of the graphs.
        learner.optimizer.zero_grad(set_to_none=True)
    total, cross_entropy, dice = torch.stack(losses).mean(dim=0).tolist()
    return FitReport(len(losses), slices, total, cross_entropy, dice, time.perf_counter() - started, waiting)


def default_loaders(device: torch.device) -> int:
    """Number of threads that make batches while the network trains."""
    if device.type == "cuda":
        return min(MOST_LOADERS, default_threads())
    # If the network uses all cores, another thread costs more time than waiting: a third of the demo's rounds.
    return int(device.type != "cpu" or torch.get_num_threads() < default_threads())


def _sizes(windows: int, options: Training) -> list[int]:
    """Numbers of slices in an epoch's batches: in the full ones and in the last one, if there are both."""
    full, rest = divmod(windows, options.batch_size)
    return [number * options.window for number in ((options.batch_size,) if full else ()) + ((rest,) if rest else ())]


def _with_graph(
    calls: Iterator[Callable[[], Batch]], work: Pass, parameters: Sequence[nn.Parameter], steps: int, sizes: Sequence[int]
) -> tuple[Iterator[Callable[[], Batch]], Pass]:
    """The calls, and the pass of batches of these sizes as CUDA graphs if there are enough steps."""
    if steps < WORTH:
        return calls, work
    first = next(calls)
    images, labels = first()
    examples = [(images.new_zeros(size, *images.shape[1:]), labels.new_zeros(size, *labels.shape[1:])) for size in sizes]
    return chain([first], calls), captured(work, examples, parameters)


def wait_for_earlier(under_way: deque[torch.cuda.Event], device: torch.device) -> None:
    """Note a step that was handed to the GPU, and wait for the one before the last, whose batch keeps its memory so long."""
    under_way.append(torch.cuda.Event())
    under_way[-1].record(torch.cuda.current_stream(device))
    if len(under_way) > 2:
        under_way.popleft().synchronize()


def pull_back(parameters: Sequence[Tensor], start: Sequence[Tensor], strength: float) -> None:
    """Add the gradient of FedProx's term μ/2 · ‖θ − θ_start‖² to the parameters' gradients.

    Args:
        parameters: the parameters θ.
        start: their values θ_start.
        strength: μ.
    """
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=strength)
