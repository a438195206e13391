"""A fit with differential privacy: what one patient can change, and the noise."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flapsam.learning import private
from flapsam.learning.cuda_graph import Batch
from flapsam.learning.prepared import Middle, PreparedCase
from flapsam.learning.private import by_patient, clipped, fit_privately
from flapsam.learning.slices import labels_to_square, to_square
from flapsam.learning.training import Learner, batch_of, segmentation_loss
from flapsam.run.config import Privacy, Rounds, RunConfig, Samples, Training
from flapsam.run.reading import read_config
from flapsam.sam import Sam, assemble_run, trained
from flapsam.sam.strategies import STRATEGIES
from tests.helpers.families import SMALL, small_run
from tests.helpers.randomness import Seeded

pytestmark = pytest.mark.usefixtures("small_families")

CLIP = 1e-3
WHOLE = Privacy(clip=CLIP, sampling=1, windows=6)
"""Every patient takes part in every step with all slices, so that no chance but the noise is left."""
OPTIONS = Training(window=1, augment="none", schedule_epochs=None, warmup_steps=1)


def assembled(folder: Path, strategy: str, backbone: str = "small-vit", **training: object) -> tuple[Sam, RunConfig]:
    fields = {"strategy": strategy, "backbone": {"name": backbone, "weights": "random"}}
    config = read_config(small_run(folder / "run.yaml", folder, **fields))
    # A window of three slices, because slices meet in flap-volume.
    options = OPTIONS.model_copy(update={"window": 3 if STRATEGIES[strategy].volume else 1, **training})
    return assemble_run(config).network, config.model_copy(update={"training": options})


def gradients(
    network: Sam, options: Training, cases: list[PreparedCase], privacy: Privacy, noise: float, seed: int = 0, steps: int = 1
) -> list[list[Tensor]]:
    """What the optimizer sees in each step, with parameters that stay as they are."""
    learner, seen = Learner(network, options, Rounds(count=1, steps=steps)), []
    parameters = list(learner.parameters.values())

    def step() -> None:
        seen.append([torch.zeros(0) if p.grad is None else p.grad.clone() for p in parameters])

    learner.optimizer.step = step  # type: ignore[method-assign]
    fit_privately(network, learner, cases, Samples(), privacy, noise, randomness=Seeded(seed))
    return seen


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in tensors]).double().numpy()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_patient_changes_a_step_by_no_more_than_the_clip(
    strategy: str, cases: list[PreparedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(private, "normal", lambda source, count: np.zeros(count))
    network, config = assembled(tmp_path, strategy)
    # Everything in the slices of the third patient is labelled as the opposite of what it is.
    labels = cases[2].folder / f"{cases[2].name}.label.npy"
    np.save(labels, (2 - np.load(labels)).astype(np.int8))
    both, without = (flat(gradients(network, config.training, part, WHOLE, 1.0)[0]) for part in (cases, cases[:2]))
    difference = float(np.linalg.norm(both - without))
    # The optimizer sees gradients as multiples of the clip. This patient uses up what is allowed, and no more.
    assert 0.9999 < difference <= 1 + 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_has_the_noise_that_was_asked_for(strategy: str, tmp_path: Path):
    network, config = assembled(tmp_path, strategy)
    numbers = [flat(step) for step in gradients(network, config.training, [], WHOLE, 3.0, steps=12)]
    drawn = np.concatenate(numbers) / 3.0
    assert len(drawn) >= 10_000
    assert stats.kstest(drawn, "norm").pvalue > 0.001
    assert drawn.std() == pytest.approx(1, abs=4 / math.sqrt(2 * len(drawn)))
    # The parameters that the loss does not depend on get no noise.
    scored = [name for name, p in network.named_parameters() if p.requires_grad and "iou" in name]
    assert bool(scored) == (strategy in ("full", "decoder", "lora-decoder"))
    assert len(numbers[0]) == sum(
        p.numel() for name, p in network.named_parameters() if p.requires_grad and not has_no_gradient(name)
    )


def has_no_gradient(name: str) -> bool:
    """Whether no parameter of this name has a gradient: the IoU head, and the prompt encoder but for two tensors."""
    return "iou_prediction_head" in name or ("prompt_encoder" in name and "no_mask" not in name)


@pytest.mark.parametrize("backbone", SMALL)
def test_a_step_is_the_sum_of_the_patients_clipped_gradients(
    backbone: str, cases: list[PreparedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Compared with PyTorch's own clipping, patient by patient."""
    monkeypatch.setattr(private, "normal", lambda source, count: np.zeros(count))
    network, config = assembled(tmp_path, "flap", backbone)
    options, clip = config.training, 0.05
    found = flat(gradients(network, options, cases, WHOLE.model_copy(update={"clip": clip}), 1.0)[0])
    parameters = list(trained(network).values())
    expected, norms = [torch.zeros_like(parameter) for parameter in parameters], []
    for case in cases:
        windows = [case.window(centre, 1, Samples()) for centre in range(case.slices)]
        images = to_square(torch.cat([window[0] for window in windows]), 32, "stretch")
        labels = labels_to_square(torch.cat([window[1] for window in windows]), 32, "stretch")
        network.zero_grad()
        segmentation_loss(network(images), labels, options).total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip)))
        for total, parameter in zip(expected, parameters, strict=True):
            total += 0 if parameter.grad is None else parameter.grad / clip
    assert min(norms) > clip
    assert np.allclose(found, flat(expected), rtol=1e-3, atol=1e-5) and np.abs(found).max() > 0.01


def test_every_patient_contributes_as_many_windows(
    cases: list[PreparedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise, memory and time would tell how many slices a patient has."""
    network, config = assembled(tmp_path, "flap")
    shown: list[list[int]] = []

    def watched(part: list[Middle], *rest: Any) -> Batch:
        shown.append([centre for _, centre in part])
        return batch_of(part, *rest)

    monkeypatch.setattr(private, "batch_of", watched)
    short = replace(cases[0], slices=2)
    gradients(network, config.training, [short, cases[1]], WHOLE.model_copy(update={"windows": 5}), 1.0)
    assert [len(part) for part in shown] == [5, 5]
    assert sorted(shown[0]) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]) and len(set(shown[1])) == 5


def test_patients_take_part_independently(cases: list[PreparedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counts: list[int] = []
    network, config = assembled(tmp_path, "flap")
    drawn = private._drawn
    monkeypatch.setattr(private, "_drawn", lambda *args: counts.append(len(list(drawn(*args)))) or [])
    many = [replace(cases[0], subject=f"patient_{number}") for number in range(10)]
    monkeypatch.setattr(private, "batch_of", lambda *args: None)
    gradients(network, config.training, many, Privacy(sampling=0.3, clip=CLIP), 1.0, steps=400)
    # A binomial distribution with a mean of 3 and a variance of 2.1; the standard errors are 0.07 and 0.15.
    assert np.mean(counts) == pytest.approx(3, abs=0.25) and np.var(counts) == pytest.approx(2.1, abs=0.5)


def test_all_cases_of_a_patient_count_as_one(cases: list[PreparedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    same = [replace(case, subject="p") for case in cases]
    assert [len(part) for part in by_patient(cases)] == [1, 1, 1] and [len(part) for part in by_patient(same)] == [3]
    monkeypatch.setattr(private, "normal", lambda source, count: np.zeros(count))
    network, config = assembled(tmp_path, "flap")
    (step,) = gradients(network, config.training, same, WHOLE, 1.0)
    assert np.linalg.norm(flat(step)) <= 1


def test_a_gradient_is_scaled_to_the_clip_or_left_alone():
    assert np.allclose(clipped(np.array([3.0, 4.0]), 2), [0.6, 0.8], rtol=2e-6)
    assert np.allclose(clipped(np.array([0.3, 0.4]), 2), [0.15, 0.2], rtol=2e-6)
    for length in (1e-6, 1e-3, 1.0, 1e6):
        for clip in (1e-6, 1e6):
            assert np.linalg.norm(clipped(np.full(400, length), clip)) <= 1
    for broken in (math.nan, math.inf):
        # Not a failure, which would tell the server about a patient.
        assert np.array_equal(clipped(np.array([1.0, broken]), 1), [0, 0])


def test_a_fit_repeats_with_the_same_randomness_and_with_no_other(cases: list[PreparedCase], tmp_path: Path):
    network, config = assembled(tmp_path, "partial-decoder", augment="gentle")
    privacy = Privacy(clip=CLIP, windows=2)
    first, again, other = (flat(gradients(network, config.training, cases, privacy, 1.0, seed)[0]) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and (first != other).mean() > 0.999


def test_a_fit_without_noise_or_with_a_length_that_patients_set_is_a_mistake(cases: list[PreparedCase], tmp_path: Path):
    network, config = assembled(tmp_path, "flap")
    with pytest.raises(ValueError, match="noise"):
        gradients(network, config.training, cases, WHOLE, 0.0)
    learner = Learner(network, config.training, Rounds(count=1))
    with pytest.raises(ValueError, match="fixed number of steps"):
        fit_privately(network, learner, cases, Samples(), WHOLE, 1.0, randomness=Seeded())
