import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from monai.losses.dice import DiceLoss
from safetensors.torch import save_file

from flapsam.base.errors import FlapsamError
from flapsam.learning.cuda_graph import Batch
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.training import Learner, batches, batches_per_epoch, fit, learning_rate, pull_back, segmentation_loss
from flapsam.run.config import Backbone, Lora, Rounds, Samples, Training
from flapsam.sam import assemble, travelling, travelling_state
from flapsam.sam.checkpointing import checkpoint_layers
from flapsam.sites import IGNORED


def scene(ignored: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 8, 8), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < ignored] = IGNORED
    return torch.randn(2, 3, 8, 8, generator=draw), labels


def test_the_dice_term_matches_monai():
    logits, labels = scene()
    monai = DiceLoss(softmax=True, to_onehot_y=True, squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)
    assert segmentation_loss(logits, labels, Training()).dice.item() == pytest.approx(
        monai(logits, labels[:, None]).item(), abs=1e-6
    )


def test_ignored_voxels_change_nothing():
    logits, labels = scene(ignored=0.3)
    altered = logits.clone()
    altered.movedim(1, -1)[labels == IGNORED] = 17.0
    first, second = segmentation_loss(logits, labels, Training()), segmentation_loss(altered, labels, Training())
    assert first.total.item() == pytest.approx(second.total.item(), abs=1e-7)


def test_a_batch_that_is_ignored_entirely_has_no_gradient():
    logits, labels = scene()
    logits.requires_grad_()
    loss = segmentation_loss(logits, torch.full_like(labels, IGNORED), Training()).total
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and logits.grad.abs().max() == 0


def test_the_foreground_weight_matches_the_value_by_hand():
    # The background voxel has logits 0 and 0, so its cross-entropy is log 2. The foreground voxel has 0 and 1: log(1 + 1/e).
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0, 1] = 1.0
    labels = torch.tensor([[[0, 1]]])
    background, foreground = math.log(2), math.log(1 + math.exp(-1))
    loss = segmentation_loss(logits, labels, Training(foreground_weight=3)).cross_entropy
    assert loss.item() == pytest.approx((background + 3 * foreground) / 4)


def made(cases: Sequence[PreparedCase], options: Training, seed: int = 0, first: int = 0) -> list[Batch]:
    """All batches of an epoch."""
    return [make() for make in batches(cases, options, Samples(), 32, seed, first=first)]


def test_every_slice_is_the_centre_of_one_window_and_the_last_batch_is_kept(cases):
    options = Training(window=5, batch_size=4, augment="none")
    sizes = [len(images) for images, _ in made(cases, options)]
    assert sizes == [20, 20, 20, 20, 10]  # 18 windows of 5 slices, 4 windows per batch
    assert batches_per_epoch(cases, options) == 5


def test_a_share_of_the_empty_slices_is_used(cases):
    occupied = sum(len(case.occupied) for case in cases)
    assert occupied == sum(int((case.labels() > 0).any(axis=(1, 2)).sum()) for case in cases)
    assert 0 < occupied < 18  # of 3 cases with 6 slices
    options = Training(window=1, batch_size=1, empty_slices=0.5, augment="none")
    used = [labels for seed in (0, 1) for _, labels in made(cases, options, seed)]
    assert len(used) == 2 * batches_per_epoch(cases, options) == 2 * (occupied + round((18 - occupied) / 2))
    assert sum(bool((labels > 0).any()) for labels in used) == 2 * occupied


def test_one_slice_is_used_if_all_are_empty(cases):
    empty = [replace(case, occupied=frozenset()) for case in cases]
    options = Training(window=1, batch_size=4, empty_slices=0, augment="none")
    assert [len(images) for images, _ in made(empty, options)] == [1]
    assert batches_per_epoch(empty, options) == 1


def test_the_learning_rate_may_fall_until_the_end_of_the_run():
    options = Training(learning_rate=1.0, warmup_steps=2, schedule_epochs=None, schedule_power=1, epochs=2)
    # 3 rounds of 2 epochs of 2 batches are 12 steps, 10 of them after the warm-up.
    rates = [learning_rate(step, 2, options, Rounds(count=3)) for step in range(12)]
    assert rates == pytest.approx([0.5, 0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_the_learning_rate_of_rounds_of_steps_falls_until_the_end_of_the_run():
    options = Training(learning_rate=1.0, warmup_steps=2, schedule_epochs=None, schedule_power=1)
    rates = [learning_rate(step, 100, options, Rounds(count=4, steps=3)) for step in range(12)]
    assert rates == pytest.approx([0.5, 0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_rounds_of_steps_show_every_slice_once_an_epoch(cases):
    """Eighteen slices in batches of four: five steps an epoch. The third round of two steps meets two epochs."""
    options = Training(window=1, batch_size=4, augment="none", warmup_steps=2)
    net = network()
    learner = Learner(net, options, Rounds(count=5, steps=2))
    seen: list[list[bytes]] = []
    net.register_forward_pre_hook(lambda _, given: seen.append([image.numpy().tobytes() for image in given[0]]))
    slices = [fit(net, learner, cases, Samples(), seed=0).slices for _ in range(5)]
    assert slices == [8, 8, 6, 8, 6]
    assert learner.steps == 10
    every = sorted(image for batch in seen[:5] for image in batch)
    assert every == sorted(image for batch in seen[5:] for image in batch)
    shown = [image for images, _ in made(cases, options, 7) for image in images]
    assert every == sorted(image.numpy().tobytes() for image in shown)


def test_batches_that_are_left_out_change_no_later_one(cases):
    options = Training(window=1, batch_size=4, augment="paper")
    whole, rest = (made(cases, options, 3, first) for first in (0, 2))
    assert len(rest) == len(whole) - 2
    for one, other in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_depend_on_the_seed_alone(cases):
    first, repeated, reseeded = (made(cases, Training(), seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, repeated, strict=True))
    assert not torch.equal(first[0][0], reseeded[0][0])


def network(name: str = "flap"):
    return assemble(
        Backbone(name="sam-tiny-1", weights="random"),
        image_size=32,
        classes=2,
        strategy_name=name,
        lora=Lora(rank=2),
        seed=0,
    ).network


OPTIONS = Training(window=1, batch_size=6, warmup_steps=2)


def test_training_changes_only_the_travelling_tensors(cases):
    net = network("lora")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fit(net, Learner(net, OPTIONS), cases, Samples(), seed=0)
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_a_resumed_learner_matches_one_that_never_stopped(cases, tmp_path: Path):
    torch.use_deterministic_algorithms(True)
    straight = network("full")
    learner = Learner(straight, OPTIONS)
    for seed in range(2):
        fit(straight, learner, cases, Samples(), seed=seed)
    stopped = network("full")
    first = Learner(stopped, OPTIONS)
    fit(stopped, first, cases, Samples(), seed=0)
    first.save(tmp_path / "moments")
    second = Learner(stopped, OPTIONS)
    second.load(tmp_path / "moments")
    fit(stopped, second, cases, Samples(), seed=1)
    assert second.steps == learner.steps == 6
    expected, actual = travelling_state(straight), travelling_state(stopped)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_moments_are_refused(cases, keep: int, tmp_path: Path):
    path = tmp_path / "moments"
    net = network("lora")
    learner = Learner(net, OPTIONS)
    fit(net, learner, cases, Samples(), seed=0)
    learner.save(path)
    Learner(net, OPTIONS).load(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FlapsamError, match="cannot read the client"):
        Learner(net, OPTIONS).load(path)


def test_moments_of_another_network_are_refused(tmp_path: Path):
    path = tmp_path / "moments"
    save_file({"exp_avg/no.such.parameter": torch.zeros(1)}, path, metadata={"steps": "1"})
    with pytest.raises(FlapsamError, match="cannot read the client"):
        Learner(network("lora"), OPTIONS).load(path)


def test_the_proximal_term_matches_the_value_by_hand():
    theta = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    theta.grad = torch.tensor([0.5, 0.5])
    pull_back([theta], [torch.tensor([1.0, 1.0])], 0.1)
    assert theta.grad.tolist() == pytest.approx([0.7, 0.3])  # 0.5 + 0.1 · (3 − 1), 0.5 + 0.1 · (−1 − 1)


def test_the_report_counts_steps_and_slices(cases):
    net = network()
    report = fit(net, Learner(net, OPTIONS), cases, Samples(), seed=0)
    assert (report.steps, report.slices) == (3, 18)
    assert 0 <= report.waiting < report.seconds
    assert report.loss == pytest.approx(0.2 * report.cross_entropy + 0.8 * report.dice_loss, rel=1e-5)


ENTROPY = Training(window=1, batch_size=6, warmup_steps=2, cross_entropy=1, dice=0, augment="none")


def gradients(cases, options: Training, *, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    """The gradients of the first step."""
    net = network()
    if checkpointing:
        checkpoint_layers(net)
    fit(net, Learner(net, options.model_copy(update={"batch_size": 18})), cases, Samples(), seed=0)
    return {name: parameter.grad for name, parameter in travelling(net).items() if parameter.grad is not None}


@pytest.mark.parametrize("micro_batch", [9, 6, 4, 1])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(cases, micro_batch: int):
    # Cross-entropy is a mean over pixels, so the gradients of the parts add up to that of the batch, whatever their sizes.
    whole = gradients(cases, ENTROPY)
    parts = gradients(cases, ENTROPY.model_copy(update={"micro_batch": micro_batch}))
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-3)


def test_checkpointing_does_not_change_the_gradients(cases):
    straight, checkpointed = gradients(cases, ENTROPY), gradients(cases, ENTROPY, checkpointing=True)
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in straight.items())


@pytest.mark.no_cover
def test_training_lowers_the_loss(cases):
    net = network("full")
    options = Training(window=1, batch_size=6, warmup_steps=5, epochs=25, learning_rate=2e-3, augment="none")
    learner = Learner(net, options)
    first = fit(net, learner, cases, Samples(), seed=0)
    last = fit(net, learner, cases, Samples(), seed=1)
    assert last.loss < 0.7 * first.loss
