"""A client's local fit with differential privacy for every patient (DP-SGD, Abadi et al. 2016, arXiv 1607.00133)."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from flapsam.base.device import sample_device
from flapsam.base.randomness import Randomness, normal, uniform
from flapsam.learning.cuda_graph import Batch
from flapsam.learning.features import Features, can_be_kept
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.training import (
    FitReport,
    Learner,
    backward,
    batch_of,
    learning_rate,
    loss_of,
    middles,
    pull_back,
)
from flapsam.run.config import Privacy, Samples, Training
from flapsam.sam import Sam

ROUNDING = 1e-6
"""Share by which a clipped gradient stays below its largest norm, so that rounding cannot carry it beyond."""


def fit_privately(
    network: Sam,
    learner: Learner,
    cases: Sequence[PreparedCase],
    samples: Samples,
    privacy: Privacy,
    noise: float,
    *,
    randomness: Randomness,
    precision: str = "fp32",
    on_step: Callable[[], None] = lambda: None,
) -> FitReport:
    """Train the network's trainable parameters for the steps of a round, in place of ``training.fit``.

    In a step, every patient takes part with probability ``privacy.sampling``, independently of all others. The gradient of a
    patient's windows, over all trained parameters together, is scaled down to the norm C = ``privacy.clip``. To the sum over
    the patients, Gaussian noise with a standard deviation of ``noise`` · C is added. Of the patients, the optimizer sees
    only this sum, divided by C. Their number enters nowhere.

    Args:
        network: the network with the parameters that the server sent. It is changed in place.
        learner: the site's training state. It is changed in place.
        cases: the training cases. All cases of a patient count as one.
        samples: how volumes become samples.
        privacy: clipping and sampling.
        noise: standard deviation of the noise as a multiple of C.
        randomness: source of the sampling, the augmentation and the noise.
        precision: ``bf16`` runs the network under autocast.
        on_step: called after every step.

    Returns:
        What the fit did. No noise protects it, so it must not leave the site.
    """
    options, steps = learner.options, learner.rounds.steps
    if steps is None or options.schedule_epochs is not None or not noise > 0:
        raise ValueError("a private fit needs a fixed number of steps, a schedule without epochs, and noise")
    network.train()
    started = time.perf_counter()
    device = network.pixel_mean.device
    making = sample_device(device)
    features = Features(network, cases, samples, precision) if can_be_kept(network, options, samples) else None
    forward = network.logits if features else partial(network, depth=options.window)
    moving = _with_gradient(network, learner, options)
    start = [parameter.detach().clone() for parameter in moving] if options.proximal else []
    patients = by_patient(cases)
    losses: list[Tensor] = []
    slices = 0
    for _ in range(steps):
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(learner.steps, 1, options, learner.rounds)
        total = np.zeros(sum(parameter.numel() for parameter in moving))
        for batch in _drawn(patients, options, samples, privacy, network.image_size, randomness, features, making):
            learner.optimizer.zero_grad(set_to_none=True)
            losses.append(backward(forward, batch, device, options, precision, privacy.windows))
            total += clipped(_flat_gradient(moving), privacy.clip)
            slices += len(batch[0])
        total += noise * normal(randomness, len(total))
        learner.optimizer.zero_grad(set_to_none=True)
        _set_gradient(moving, total)
        if options.proximal:
            pull_back(moving, start, options.proximal)
        learner.optimizer.step()
        learner.steps += 1
        on_step()
    loss, cross_entropy, dice = torch.stack(losses).mean(dim=0).tolist() if losses else [math.nan] * 3
    return FitReport(steps, slices, loss, cross_entropy, dice, time.perf_counter() - started, 0.0)


def by_patient(cases: Sequence[PreparedCase]) -> list[list[PreparedCase]]:
    """The cases of each patient, in the order of the sites' and the patients' names."""
    patients: dict[tuple[str, str], list[PreparedCase]] = {}
    for case in cases:
        patients.setdefault((case.site, case.patient), []).append(case)
    return [patients[name] for name in sorted(patients)]


def clipped(gradient: np.ndarray, most: float) -> np.ndarray:
    """Scale a gradient down to a Euclidean norm of at most ``most``, and divide it by ``most``.

    A gradient that is not finite becomes 0. If it ended the fit, a server could send tensors with which the failure tells
    whether a certain patient takes part.

    Args:
        gradient: the gradient (numbers,).
        most: the largest norm.

    Returns:
        A vector with a norm of at most 1.
    """
    norm = float(np.linalg.norm(gradient))
    if not math.isfinite(norm):
        return np.zeros_like(gradient)
    return gradient * ((1 - ROUNDING) / max(norm, most))


def _drawn(
    patients: Sequence[Sequence[PreparedCase]],
    options: Training,
    samples: Samples,
    privacy: Privacy,
    size: int,
    randomness: Randomness,
    features: Features | None,
    device: torch.device,
) -> Iterator[Batch]:
    """Draw a step's patients (Poisson sampling), and for each of them a batch of its windows."""
    takes_part = uniform(randomness, len(patients)) <= privacy.sampling
    rng = np.random.default_rng(int.from_bytes(randomness.bytes(16)))
    for cases, taken in zip(patients, takes_part, strict=True):
        if taken:
            every = middles(cases, options, rng)
            # Always as many, so that neither memory nor time depends on how many slices a patient has.
            chosen = np.resize(rng.permutation(len(every)), privacy.windows)
            yield batch_of([every[index] for index in chosen], options, samples, size, rng, features, device)


def _with_gradient(network: Sam, learner: Learner, options: Training) -> list[nn.Parameter]:
    """The trained parameters that the loss depends on, found with an empty image. Others would follow the noise alone."""
    learner.optimizer.zero_grad(set_to_none=True)
    images = network.pixel_mean.new_zeros(options.window, 3, network.image_size, network.image_size)
    labels = torch.zeros(options.window, network.image_size, network.image_size, dtype=torch.long)
    loss_of(partial(network, depth=options.window), (images, labels), images.device, options, "fp32").total.backward()
    moving = [parameter for parameter in learner.parameters.values() if parameter.grad is not None]
    learner.optimizer.zero_grad(set_to_none=True)
    return moving


def _flat_gradient(parameters: Sequence[nn.Parameter]) -> np.ndarray:
    """All gradients as one vector of float64, in which sums of many patients are exact enough."""
    parts = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
    flat = torch.cat([part.detach().flatten() for part in parts])
    return flat.cpu().double().numpy()


def _set_gradient(parameters: Sequence[nn.Parameter], gradient: np.ndarray) -> None:
    flat = torch.from_numpy(gradient.astype(np.float32))
    for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.device, copy=True)
