"""Prediction of slices, in batches, mirrored and along three axes, and the cleaning of label maps."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flapsam.learning.cleaning import fill_holes, keep_largest
from flapsam.learning.inference import (
    PredictionOptions,
    _largest,
    class_probabilities,
    predict_volume,
    slices_at_once,
    usual_precision,
)
from flapsam.learning.slices import stack_of
from flapsam.run.config import Samples
from flapsam.sam import ARCHITECTURES, build, fuse
from flapsam.volumes import Volume
from tests.helpers.adapters import trained
from tests.learning.test_slices import Brightest
from tests.volumes.test_volumes import stored_as

RNG = np.random.default_rng


def volume(shape: tuple[int, int, int] = (20, 18, 12)) -> Volume:
    return Volume(RNG(0).normal(size=shape).astype(np.float32), np.diag([1.0, 1, 3, 1]))


class Recording(Brightest):
    """Keeps the slices that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def embed(self, images: Tensor, depth: int | None = None) -> Tensor:
        self.seen += list(images)
        return super().embed(images, depth)


@pytest.mark.parametrize("strategy", ["flap", "lora-decoder", "full"])
def test_the_fused_network_computes_the_same_logits(strategy: str):
    network = trained(strategy)[0].network.eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "rel_pos" in name:
                parameter.normal_(std=0.2)
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
    fuse(network)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), expected, atol=2e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in network.named_parameters())


@pytest.mark.parametrize("batch", [1, 2, 5, 12, 50])
@pytest.mark.parametrize("blank", [(), (0,), (3, 4, 5, 9), (11,), (0, 1, 2, 3, 4, 5, 6, 7), tuple(range(12))], ids=str)
def test_blank_slices_are_predicted_once_and_change_nothing(batch: int, blank: tuple[int, ...]):
    image = volume()
    image.array[...] += 10
    image.array[:, :, list(blank)] = 0
    samples = Samples(size=64, scaling="volume")
    network = Recording()
    steps: list[int] = []
    labels = predict_volume(
        network,  # type: ignore[arg-type]
        image,
        samples,
        batch=batch,
        on_slices=lambda count, of: steps.append(count),
    ).labels
    assert sum(steps) == 12
    assert max(steps) <= batch
    assert len(network.seen) == 12 - max(len(blank) - 1, 0)
    expected = np.stack([predict_slice(network, image, samples, k) for k in range(12)], axis=-1)
    np.testing.assert_array_equal(labels, expected)


def predict_slice(network: Brightest, image: Volume, samples: Samples, k: int) -> np.ndarray:
    """The labels of slice ``k``, predicted alone with the scaling of the whole volume."""
    stack = stack_of(image, samples)
    square = torch.nn.functional.interpolate(stack.window(k), (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    logits = network.logits(network.embed(square)).softmax(1)
    return torch.nn.functional.interpolate(logits, stack.shape[1:], mode="bilinear", antialias=True).argmax(1)[0].numpy()


@pytest.mark.parametrize("codes", ["RAS", "LIP", "SAR"])
@pytest.mark.parametrize(
    ("axis", "flips"), [("axial", "x"), ("axial", "xy"), ("coronal", "xz"), ("sagittal", "y"), ("axial", "z")]
)
def test_mirror_images_are_flipped_back_and_averaged(axis: str, flips: str, codes: str):
    """The result is the mean over all mirror images of the patient, each segmented alone and flipped back."""
    assembled, card = trained("flap")
    samples = card.samples.model_copy(update={"axis": axis})
    image = volume()
    axes = ["xyz".index(name) for name in flips if name != {"axial": "z", "coronal": "y", "sagittal": "x"}[axis]]
    parts = []
    for count in range(len(axes) + 1):
        for flipped in combinations(axes, count):
            mirrored = Volume(np.flip(image.array, flipped), image.affine)
            prediction = predict_volume(assembled.network, mirrored, samples, options=PredictionOptions(probabilities=True))
            assert prediction.probabilities is not None
            parts.append(np.flip(prediction.probabilities.astype(float), flipped))
    stored = stored_as(codes, image)
    prediction = predict_volume(
        assembled.network, stored, samples, options=PredictionOptions(flips=flips, probabilities=True)
    )
    assert prediction.probabilities is not None
    actual = Volume(prediction.probabilities, stored.affine).to_canonical().array
    assert abs(actual - np.mean(parts, axis=0)).max() <= 2


@pytest.mark.parametrize("codes", ["RAS", "IPL"])
def test_three_planes_are_averaged(codes: str):
    assembled, card = trained("flap")
    image = stored_as(codes, volume())
    planes = []
    for axis in ("sagittal", "coronal", "axial"):
        samples = card.samples.model_copy(update={"axis": axis})
        prediction = predict_volume(assembled.network, image, samples, options=PredictionOptions(probabilities=True))
        assert prediction.probabilities is not None
        planes.append(prediction.probabilities.astype(float))
    prediction = predict_volume(
        assembled.network, image, card.samples, options=PredictionOptions(planes=True, probabilities=True)
    )
    assert prediction.probabilities is not None
    assert abs(prediction.probabilities - sum(planes) / 3).max() <= 1.5
    np.testing.assert_array_equal(prediction.labels, prediction.probabilities.argmax(-1))
    assert abs(prediction.probabilities.sum(-1, dtype=int) - 65535).max() <= 9
    plain = predict_volume(assembled.network, image, card.samples, options=PredictionOptions(planes=True))
    assert plain.probabilities is None
    np.testing.assert_array_equal(plain.labels, prediction.labels)


def test_half_precision_is_close_and_full_precision_is_the_default():
    assembled, card = trained("flap")
    stack = stack_of(volume(), card.samples)
    full, half = (
        torch.cat([p for _, p in class_probabilities(assembled.network, stack, precision=precision)])
        for precision in ("fp32", "bf16")
    )
    assert 0 < (full - half).abs().max() < 0.2
    default = torch.cat([p for _, p in class_probabilities(assembled.network, stack)])
    assert torch.equal(default, full)


def test_the_precision_follows_from_the_device_alone(monkeypatch: pytest.MonkeyPatch):
    assert [usual_precision(torch.device(name)) for name in ("cpu", "mps")] == ["fp32", "fp32"]
    for capability, expected in {(7, 5): "fp16", (8, 0): "bf16", (9, 0): "bf16"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert usual_precision(torch.device("cuda")) == expected


def test_half_precision_that_overflows_gives_way_to_full_precision(caplog: pytest.LogCaptureFixture):
    """The encoder's embedding is infinite in half precision alone."""
    assembled, card = trained("flap", size=64)
    stack = stack_of(volume(), card.samples)
    network = assembled.network
    embed = network.embed

    def overflowing(images: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        embedding = embed(images, depth)
        return embedding * torch.inf if torch.is_autocast_enabled("cpu") else embedding

    wanted = torch.cat([p for _, p in class_probabilities(network, stack)])
    network.embed = overflowing
    found = torch.cat([p for _, p in class_probabilities(network, stack, precision="bf16")])
    assert torch.equal(found, wanted)
    assert [record.message for record in caplog.records] == [
        "bf16 overflows in this network, so the rest is predicted in fp32"
    ]


@pytest.mark.parametrize(
    ("name", "size", "shape", "expected"),
    [("sam-vit-b", 224, (512, 512), 8), ("sam-vit-b", 1024, (512, 512), 1), ("sam-tiny", 128, (64, 64), 8)],
)
def test_the_number_of_slices_at_once_is_limited_by_memory(name: str, size: int, shape: tuple[int, int], expected: int):
    with torch.device("meta"):
        network = build(ARCHITECTURES[name], image_size=size, classes=2)
    network.pixel_mean = torch.zeros(1)
    assert slices_at_once(network, shape) == expected


def block(*boxes: Any, value: int = 1, labels: np.ndarray | None = None) -> np.ndarray:
    labels = np.zeros((8, 8, 8), np.uint8) if labels is None else labels
    for box in boxes:
        labels[box] = value
    return labels


LARGE, SMALL = np.s_[0:3, 0:3, 0:3], np.s_[5:7, 5:7, 5:7]
CLEANED: dict[str, tuple[Callable, np.ndarray, np.ndarray]] = {
    "the larger of two stays": (keep_largest, block(LARGE, SMALL), block(LARGE)),
    "what touches at a corner is one": (
        keep_largest,
        block(np.s_[0:2, 0:2, 0:2], np.s_[2:4, 2:4, 2:4]),
        block(np.s_[0:2, 0:2, 0:2], np.s_[2:4, 2:4, 2:4]),
    ),
    "classes are apart": (
        keep_largest,
        block(SMALL, value=2, labels=block(LARGE)),
        block(SMALL, value=2, labels=block(LARGE)),
    ),
    "nothing there": (keep_largest, block(), block()),
    "a hole is filled": (fill_holes, block(np.s_[1, 1, 1], value=0, labels=block(LARGE)), block(LARGE)),
    "an open dent is not": (
        fill_holes,
        block(np.s_[0, 1, 1], value=0, labels=block(LARGE)),
        block(np.s_[0, 1, 1], value=0, labels=block(LARGE)),
    ),
    "another class in a hole stays": (
        fill_holes,
        block(np.s_[1, 1, 1], value=2, labels=block(LARGE)),
        block(np.s_[1, 1, 1], value=2, labels=block(LARGE)),
    ),
}


@pytest.mark.parametrize(("clean", "labels", "expected"), CLEANED.values(), ids=CLEANED)
def test_label_maps_are_cleaned(clean: Callable, labels: np.ndarray, expected: np.ndarray):
    for order in ("C", "F"):
        cleaned = np.array(labels, order=order)
        clean(cleaned)
        np.testing.assert_array_equal(cleaned, expected)


@pytest.mark.parametrize("classes", [1, 2, 3, 30])
def test_the_largest_probability_wins_and_the_first_of_equal_ones(classes: int):
    probabilities = torch.from_numpy(RNG(0).integers(0, 4, size=(3, classes, 5, 6)).astype(np.float32))
    labels = _largest(probabilities)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.argmax(probabilities.numpy(), axis=1))
