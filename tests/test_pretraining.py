"""Synthetic scenes, and pretraining on them."""

import json
import math
from pathlib import Path

import pytest
import torch
from command import flapsam
from safetensors import safe_open
from safetensors.torch import load_file

from flapsam.errors import FlapsamError
from flapsam.experiments.pretraining import Recipe, Sampled, pretext_loss, pretrain, rate
from flapsam.experiments.synthesis import FIELDS, MASKS, Scenes, draw_scenes, truth
from flapsam.federation.observer import Observer
from flapsam.sam import architecture, build, load_weights, read_checkpoint

RECIPE = Recipe(steps=5, batch=2, warmup=2, size=32)


def scenes(seed: int, batch: int = 8, size: int = 64) -> Scenes:
    return draw_scenes(batch, size, torch.Generator().manual_seed(seed))


def test_scenes_depend_on_their_seed_alone():
    first, other = scenes(1), scenes(2)
    torch.rand(3)
    again = scenes(1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_what_a_scene_holds():
    found = scenes(0, batch=32)
    assert found.images.shape == (32, 3, 64, 64)
    assert found.masks.shape == (32, len(MASKS), 32, 32)
    assert found.fields.shape == (32, len(FIELDS), 32, 32)
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert set(found.masks.unique().tolist()) == {0, 1}
    assert found.fields.isfinite().all()
    mask = {name: found.masks[:, index] > 0 for index, name in enumerate(MASKS)}
    for name, where in mask.items():
        assert 0.02 < where.float().mean() < 0.98, name
    assert not (mask["centre"] & ~mask["like the centre"]).any()


def test_the_truth_of_two_halves_by_hand():
    """Region 3 with level 0.2 at the left, region 7 with level 0.8 at the right."""
    size, half = 64, 16
    regions = torch.full((1, size, size), 3)
    regions[:, :, 32:] = 7
    masks, fields = truth(regions, torch.where(regions == 3, 0.2, 0.8), corner=(1, 0))
    right = torch.arange(32) >= half
    seen = (torch.arange(32) - half + 0.5).abs() < 8
    expected = {
        "brighter": right,
        "brighter than around": right & seen,
        "like the centre": right,
        "centre": right,
        "thin": right & ~right,
    }
    # Full columns 31 and 32 touch the border; even columns are taken.
    expected["borders"] = torch.arange(0, size, 2) == 32
    for name, columns in expected.items():
        assert torch.equal(masks[0, MASKS.index(name)], columns.float().expand(32, 32)), name
    deviation = math.sqrt(1024 * 0.3**2 / 1023)
    level = 0.3 / (deviation + 0.05)
    found = {name: fields[0, FIELDS.index(name)] for name in FIELDS}
    torch.testing.assert_close(found["level"], torch.where(right, level, -level).expand(32, 32))
    # Where the other half is in sight, it is what lies around.
    torch.testing.assert_close(found["level around"][:, 12:20], -found["level"][:, 12:20], atol=1e-3, rtol=0)
    # By symmetry; and a pixel beside the border has its own region on its far side.
    torch.testing.assert_close(found["x from centre"], -found["x from centre"].flip(1), atol=1e-4, rtol=0)
    assert (found["x from centre"][:, 15] < -0.5).all()
    assert (found["x from centre"][:, 16] > 0.5).all()
    # Cells of 4 × 4 pixels, a Gaussian of 0.04 · 16 cells: half of the neighbourhood and half of the pixel's own cell.
    weights = [math.exp(-(distance**2) / (2 * 0.64**2)) for distance in range(8)]
    share = sum(weights) / (2 * sum(weights) - 1)
    torch.testing.assert_close(found["near share"][:, 16], torch.full((32,), 4 * share - 3), atol=1e-4, rtol=0)


def test_the_pretext_loss_by_hand():
    """One scene of 2 × 2 pixels; half of every mask is true, all logits are 0, and the fields are off by ½."""
    masks = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).expand(1, len(MASKS), 2, 2)
    fields = torch.ones(1, len(FIELDS), 2, 2)
    outputs = torch.cat([torch.zeros(1, len(MASKS), 2, 2), fields - 0.5], dim=1)
    # Weights 0.5/(0.5 + 0.001); p = ½ everywhere: overlap 1, sums 4·¼ + 2.
    expected = 0.5 / 0.501 * math.log(2) + 1 - (2 * 1 + 1) / (1 + 2 + 1) + 0.5**2
    found = pretext_loss(outputs, Scenes(torch.zeros(1, 3, 4, 4), masks, fields, (0, 0)))
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_sampled_upscaling_gives_the_same_logits_at_its_pixels(corner: tuple[int, int]):
    network = build(architecture("sam-tiny"), image_size=32, classes=2)
    names = list(network.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = network(images)
        Sampled.put_into(network).corner = corner
        torch.testing.assert_close(network(images), whole[..., corner[0] :: 2, corner[1] :: 2], atol=1e-5, rtol=0)
    assert list(network.state_dict()) == names


def test_the_rate_rises_stays_and_falls():
    recipe = Recipe(steps=100, warmup=10, decay=0.2, learning_rate=1.0)
    assert [rate(step, recipe) for step in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])


class Interrupted(Observer):
    """Stops the work after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, count: int = 1) -> None:
        self.left -= count
        if self.left == 0:
            raise KeyboardInterrupt


def test_stopped_and_resumed_it_ends_in_the_same_weights(tmp_path: Path):
    pretrain(tmp_path / "whole", RECIPE, command="x", threads=1, every=2)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", RECIPE, command="x", threads=1, every=2, observer=Interrupted(3))
    pretrain(tmp_path / "parts", RECIPE, command="x", threads=1, every=2, resume=True, stop=3)
    with safe_open(tmp_path / "parts" / "weights.safetensors", framework="pt") as file:
        assert file.metadata()["steps"] == "3"
    pretrain(tmp_path / "parts", RECIPE, command="x", threads=1, every=2, resume=True)
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 3, 4, 5]
    with pytest.raises(FlapsamError, match="another recipe"):
        pretrain(tmp_path / "parts", Recipe(steps=6), command="x", threads=1, resume=True)
    with pytest.raises(FlapsamError, match="no pretraining to resume"):
        pretrain(tmp_path / "nothing", RECIPE, command="x", threads=1, resume=True)


def test_quick(tmp_path: Path, capfd):
    outcome = flapsam(capfd, "pretrain", tmp_path, "--quick", "--json")
    assert outcome.code == 0, outcome.err
    scores = json.loads(outcome.out)
    assert scores.keys() == {*MASKS, "mean"}
    assert all(0 <= value <= 1 for value in scores.values())
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        about = file.metadata()
    assert about["command"] == "flapsam pretrain --quick --seed 0"
    assert about["steps"] == "20"
    assert json.loads(about["held_out_iou"]).keys() == scores.keys()
    outcome = flapsam(capfd, "backbone", "info", tmp_path / "weights.safetensors", "--json")
    assert json.loads(outcome.out)["architecture"] == "sam-tiny"
    for size in (64, 128):
        network = build(architecture("sam-tiny"), image_size=size, classes=2)
        report = load_weights(network, read_checkpoint(tmp_path / "weights.safetensors"), "pretrained")
        assert {name.split(".")[1] for name in report.new} == {"iou_prediction_head", "output"}
