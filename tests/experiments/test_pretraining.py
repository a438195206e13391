"""Synthetic scenes and pretraining on them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flapsam.base.errors import FlapsamError
from flapsam.experiments.pretraining import Recipe, pretext_loss, pretrain, rate
from flapsam.experiments.synthesis import TASKS, Scenes, draw_scenes
from flapsam.experiments.teaching import Teacher
from flapsam.run.observer import Observer
from flapsam.sam import architecture, build, load_checkpoint, read_checkpoint
from flapsam.sam.tiny_vit import ConvNorm
from tests.helpers.command import flapsam
from tests.helpers.families import SMALL

RECIPE = Recipe(steps=5, batch=2, warmup=2, size=32)


@pytest.fixture
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flapsam.experiments.pretraining.HELD_OUT", 16)


def scenes(seed: int, batch: int = 8, size: int = 64) -> Scenes:
    return draw_scenes(batch, size, torch.Generator().manual_seed(seed))


def test_scenes_depend_only_on_their_seed():
    first, other = scenes(1), scenes(2)
    torch.rand(3)
    again = scenes(1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_the_masks_and_levels_of_a_scene_are_consistent():
    drawn = scenes(0, batch=32)
    assert drawn.images.shape == (32, 3, 64, 64)
    assert drawn.masks.shape == (32, len(TASKS), 64, 64)
    assert drawn.levels.shape == (32, 64, 64)
    assert drawn.images.min() >= 0
    assert drawn.images.max() <= 1
    assert set(drawn.masks.unique().tolist()) == {0, 1}
    mask = {task: drawn.masks[:, index] > 0 for index, task in enumerate(TASKS)}
    for task in ("small objects", "elongated objects", "objects at the right", "largest object", "brightest object"):
        assert mask[task].any()
        assert not (mask[task] & ~mask["objects"]).any()
    assert not mask["objects at the right"][..., :32].any()
    assert torch.equal(mask["objects at the right"][..., 32:], mask["objects"][..., 32:])
    assert mask["centre"][:, 32, 32].all()
    # Away from borders, neighbouring pixels belong to the same region, so they have the same level.
    interior = ~(mask["borders"][:, :, 1:] | mask["borders"][:, :, :-1])
    assert (drawn.levels.diff(dim=2)[interior] == 0).all()


def test_the_pretext_loss_matches_a_hand_calculation():
    """One scene of 2 × 2 pixels with one task, whose mask covers half of it. All logits are 0 and the levels are exact."""
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    levels = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    deviation = math.sqrt(4 * 0.25 / 3)
    target = (levels - 0.5) / (deviation + 0.05)
    outputs = torch.stack([torch.zeros(1, 2, 2), target], dim=1)
    # The weight is 0.5 / (0.5 + 0.001). As p = ½ everywhere, the overlap is 1 and the sums are 4 · ¼ + 2.
    expected = 0.5 / 0.501 * math.log(2) + 1 - (2 * 1 + 1) / (1 + 2 + 1)
    assert pretext_loss(outputs, Scenes(torch.zeros(1, 3, 2, 2), masks, levels)).item() == pytest.approx(expected, abs=1e-6)


def test_the_learning_rate_rises_stays_constant_and_falls():
    recipe = Recipe(steps=100, warmup=10, decay=0.2, learning_rate=1.0)
    assert [rate(step, recipe) for step in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])


class Interrupted(Observer):
    """Interrupts the work after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, count: int = 1) -> None:
        self.left -= count
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("few_held_out")
def test_resumed_pretraining_ends_with_the_same_weights(tmp_path: Path):
    pretrain(tmp_path / "whole", RECIPE, command="x", threads=1, every=2)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", RECIPE, command="x", threads=1, every=2, observer=Interrupted(3))
    pretrain(tmp_path / "parts", RECIPE, command="x", threads=1, every=2, resume=True)
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4, 5]
    with pytest.raises(FlapsamError, match="another recipe"):
        pretrain(tmp_path / "parts", Recipe(steps=6), command="x", threads=1, resume=True)
    with pytest.raises(FlapsamError, match="no pretraining to resume"):
        pretrain(tmp_path / "nothing", RECIPE, command="x", threads=1, resume=True)


@pytest.mark.usefixtures("few_held_out")
def test_a_student_learns_its_teachers_embeddings(small_families: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The teacher has two tokens where the student has one pixel less, so it sees the scenes at half their size."""
    teacher = build(SMALL["small-tiny-vit"], image_size=64, classes=3, seed=1)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    monkeypatch.setattr("flapsam.experiments.teaching.find_checkpoint", lambda backbone: tmp_path / "teacher.safetensors")
    recipe = Recipe(steps=8, batch=2, warmup=2, size=64, backbone="small-hiera", teacher="small-tiny-vit", precision="fp32")
    pretrain(tmp_path / "whole", recipe, command="x", threads=1, every=2)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", recipe, command="x", threads=1, every=2, observer=Interrupted(3))
    pretrain(tmp_path / "parts", recipe, command="x", threads=1, every=2, resume=True)
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == build(SMALL["small-hiera"], image_size=64, classes=len(TASKS)).state_dict().keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    entries = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()[1:]]
    assert entries[-1]["teacher's loss"] < entries[0]["teacher's loss"]


def test_a_student_starts_with_its_teachers_decoder(small_families: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = build(SMALL["small-tiny-vit"], image_size=64, classes=3, seed=1)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    monkeypatch.setattr("flapsam.experiments.teaching.find_checkpoint", lambda backbone: tmp_path / "teacher.safetensors")
    student = build(SMALL["small-hiera"], image_size=64, classes=2, seed=2)
    lessons = Teacher("small-tiny-vit", student)
    taught, own = teacher.state_dict(), student.state_dict()
    for name in ("mask_decoder.transformer.layers.0.mlp.lin1.weight", "prompt_encoder.no_mask_embed.weight"):
        assert torch.equal(own[name], taught[name])
    # The student's grid has 4 × 4 tokens. The teacher has as many for images of 16 pixels.
    images = torch.rand(2, 3, 64, 64)
    assert lessons.embed(images).shape == (2, 32, 4, 4)
    target = torch.nn.functional.layer_norm(lessons.embed(images).permute(0, 2, 3, 1), (32,)).permute(0, 3, 1, 2)
    # At first, the comparing layer changes nothing.
    assert lessons.loss(target.clone(), images).item() == pytest.approx(0, abs=1e-10)
    assert lessons.loss(torch.zeros_like(target), images).item() == pytest.approx(1, abs=1e-3)


def test_a_narrower_student_starts_with_a_decoder_of_its_own(small_families: None, tmp_path: Path, monkeypatch):
    save_file(build(SMALL["small-tiny-vit"], image_size=64, classes=3).state_dict(), tmp_path / "teacher.safetensors")
    monkeypatch.setattr("flapsam.experiments.teaching.find_checkpoint", lambda backbone: tmp_path / "teacher.safetensors")
    student = build(replace(SMALL["small-hiera"], decoder_width=16), image_size=64, classes=2)
    lessons = Teacher("small-tiny-vit", student)
    assert lessons.loss(torch.rand(2, 64, 4, 4), torch.rand(2, 3, 64, 64)).item() > 0


def test_pretraining_learns_the_statistics_that_fine_tuning_keeps():
    """PyTorch's own batch norm is the reference."""
    layer, norm = ConvNorm(3, 4, kernel=3), nn.BatchNorm2d(4)
    images = torch.rand(5, 3, 8, 8)

    def expected() -> torch.Tensor:
        return norm(nn.functional.conv2d(images, layer.conv.weight, padding=1))

    layer.learns_statistics = True
    torch.testing.assert_close(layer(images), expected())
    statistics = layer.state_dict()["norm.running_var"].clone()
    torch.testing.assert_close(statistics, norm.running_var)
    layer.learns_statistics = False
    norm.eval()
    torch.testing.assert_close(layer(images), expected())
    assert torch.equal(layer.state_dict()["norm.running_var"], statistics)


@pytest.mark.no_cover
@pytest.mark.usefixtures("few_held_out")
def test_quick_pretraining_writes_a_usable_checkpoint(tmp_path: Path, capfd):
    outcome = flapsam(capfd, "pretrain", tmp_path, "--quick", "--json")
    assert outcome.code == 0, outcome.err
    scores = json.loads(outcome.out)
    assert scores.keys() == {*TASKS, "mean"}
    assert all(0 <= value <= 1 for value in scores.values())
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["command"] == "flapsam pretrain --quick --seed 0"
    assert metadata["steps"] == "20"
    assert json.loads(metadata["held_out_iou"]).keys() == scores.keys()
    outcome = flapsam(capfd, "backbone", "info", tmp_path / "weights.safetensors", "--json")
    assert json.loads(outcome.out)["architecture"] == "sam-tiny"
    for size in (64, 128):
        network = build(architecture("sam-tiny"), image_size=size, classes=2)
        report = load_checkpoint(network, read_checkpoint(tmp_path / "weights.safetensors"), "pretrained")
        assert {name.split(".")[1] for name in report.new} == {"iou_prediction_head", "output"}
