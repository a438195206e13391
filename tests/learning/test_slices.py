from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.learning.augmentation import (
    AUGMENTATIONS,
    EITHER,
    Change,
    Window,
    erase,
    exponent,
    gentle,
    rotate,
    turn_and_flip,
    warp,
)
from flapsam.learning.inference import predict_volume
from flapsam.learning.prepared import prepare
from flapsam.learning.slices import SliceStack, from_square, labels_to_square, ranges_of, stack_of, to_square
from flapsam.run.config import Data, Samples
from flapsam.sites import HIDDEN, IGNORED, LabelMap, folders, label_map
from flapsam.volumes import Volume
from tests.helpers.sites import AFFINE, make_site, save


def stack(values: Sequence[Any], site: str = "", **fields) -> SliceStack:
    """A stack of one-voxel slices with these intensities. A tuple holds one intensity per modality."""
    array = np.array(values, np.float32)
    return stack_of(Volume(array[None, None], np.eye(4)), Samples(axis="axial", **fields), site)


def test_a_slice_is_scaled_with_two_neighbours_on_either_side():
    # The window of slice 3 is 10 to 50, so the slice becomes (30 − 10) / 40.
    values = [0.0, 10, 20, 30, 40, 50, 60]
    assert stack(values).window(3).item() == pytest.approx(0.5)
    # The window of slice 0 is 0 0 0 10 20.
    assert stack(values).window(0).item() == pytest.approx(0)
    assert stack(values).window(1).item() == pytest.approx(10 / 30)


def test_a_slice_may_be_scaled_by_its_volume():
    assert stack([0, 10, 20, 30, 40], scaling="volume").window(1).item() == pytest.approx(0.25)


def test_clipping_comes_before_scaling():
    values = [-1000, 0, 50, 100, 3000]
    window = stack(values, clip=(0, 100)).window(2, depth=5).flatten()
    torch.testing.assert_close(window, torch.tensor([0, 0, 0.5, 1, 1]))
    assert stack(values, clip=(0, 100), scaling="volume").window(2).item() == pytest.approx(0.5)


def test_clipping_per_site_is_equivalent_to_its_z_score():
    """The z-score of Fed-KiTS19's site A clips to (−66, 208), subtracts 100.545 and divides by 61.677.

    Scaling by the window afterwards cancels the subtraction and the division.
    """
    values = np.array([-500.0, -70, 0, 150, 900])
    scores = (values.clip(-66, 208) - 100.545) / 61.677
    expected = (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
    clips = {"clip": (-75, 296), "site_clip": {"A": (-66, 208)}}
    window = stack(values.tolist(), site="A", **clips).window(2, depth=5).flatten()
    torch.testing.assert_close(window, torch.from_numpy(expected).float(), atol=1e-6, rtol=0)
    elsewhere = stack(values.tolist(), site="B", **clips).window(2, depth=5).flatten()
    assert elsewhere[3].item() == pytest.approx((150 + 75) / (296 + 75))


def test_intensities_are_clipped_at_a_percentile_of_the_volume():
    # The 99th percentile of 0 to 100 is 99. The window of slice 99 is 97 98 99 99 99.
    values = [float(value) for value in range(101)]
    clipped = stack(values, clip_percentile=99)
    assert clipped.clip == ((-np.inf, 99.0),)
    torch.testing.assert_close(clipped.window(99, depth=5).flatten(), torch.tensor([0, 0.5, 1, 1, 1]))
    assert stack(values, clip_percentile=99, scaling="volume").window(50).item() == pytest.approx(50 / 99)
    assert stack(values, clip_percentile=99, clip=(0, 60)).clip == ((0, 60),)


@pytest.mark.parametrize("channels", ["replicate", "adjacent"])
def test_every_modality_has_its_own_channel_and_scaling(channels: str):
    two = stack([(0, 500), (10, 400), (20, 300), (30, 200), (40, 100)], channels=channels)
    torch.testing.assert_close(two.window(1).flatten(), torch.tensor([1 / 3, 2 / 3, 2 / 3]))
    assert two.window(2, depth=3).shape == (3, 3, 1, 1)
    three = stack([(0, 0, 8), (1, 0, 4)], channels=channels, scaling="volume")
    torch.testing.assert_close(three.window(1).flatten(), torch.tensor([1.0, 0, 0]))
    clipped = stack([(0, 0), (100, 1)], modalities=2, clip=(0, 50), scaling="volume")
    torch.testing.assert_close(clipped.window(1).flatten(), torch.tensor([1.0, 1, 1]))


def test_adjacent_slices_fill_the_outer_channels():
    window = stack([0, 10, 20, 30, 40], channels="adjacent").window(2)
    torch.testing.assert_close(window.flatten(), torch.tensor([0.25, 0.5, 0.75]))
    # At the edge the outermost slice stands in for its missing neighbour.
    torch.testing.assert_close(stack([0, 10, 20], channels="adjacent").window(0).flatten(), torch.tensor([0, 0, 0.5]))


@pytest.mark.parametrize("channels", ["replicate", "adjacent"])
@pytest.mark.parametrize("depth", [1, 3, 5, 9])
def test_windows_have_the_expected_shape(channels: str, depth: int):
    images = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    slices = SliceStack(images, Samples.model_validate({"channels": channels}), ranges_of(images))
    for centre in range(4):
        window = slices.window(centre, depth)
        assert window.shape == (depth, 3 if channels == "adjacent" else 1, 6, 5)
        if channels == "adjacent" or depth <= 5:
            assert 0 <= window.min() <= window.max() <= 1


def test_constant_slices_become_zero():
    assert stack([7, 7, 7]).window(1).item() == 0


@pytest.mark.parametrize("shape", [(32, 32), (40, 20), (9, 17)])
@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_resizing_to_the_square_and_back_keeps_labels(shape: tuple[int, int], resize: str):
    labels = torch.zeros(1, *shape, dtype=torch.long)
    labels[:, shape[0] // 4 : -shape[0] // 4, shape[1] // 4 : -shape[1] // 4] = 1
    square = labels_to_square(labels, 64, resize)
    assert square.shape == (1, 64, 64)
    probabilities = torch.nn.functional.one_hot(square.clamp(min=0), 2).movedim(-1, 1).float()
    back = from_square(probabilities, shape, resize).argmax(1)
    assert back.shape == labels.shape
    # Labels are resized by nearest neighbour and probabilities bilinearly, so the rim may differ.
    assert (back != labels).float().mean() < 0.08


def test_padding_keeps_the_aspect_ratio_and_is_ignored():
    square = labels_to_square(torch.ones(1, 40, 20, dtype=torch.long), 64, "pad")
    assert (square[..., :32] == 1).all()
    assert (square[..., 32:] == IGNORED).all()
    assert to_square(torch.ones(1, 1, 40, 20), 64, "pad")[..., 32:].max() == 0


def test_bicubic_overshoot_is_clipped():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:] = 1
    square = to_square(image, 64, "stretch")
    assert square.min() >= 0 and square.max() <= 1


@pytest.fixture
def window() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.zeros(5, 20, 30, dtype=torch.long)
    labels[:, 5:12, 10:22] = 1
    labels[:, 0, 0] = IGNORED
    return torch.rand(5, 1, 20, 30, generator=draw) * 0.2 + labels[:, None].clamp(min=0) * 0.6, labels


def on_one(augment: Change) -> Change:
    """An augmentation of windows as a change of a single one."""

    def change(images: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator) -> Window:
        (images,), (labels,) = augment(images[None], labels[None], rng)
        return images, labels

    change.__name__ = augment.__name__
    return change


CHANGES = [*map(on_one, AUGMENTATIONS.values()), turn_and_flip, rotate, exponent, erase, *EITHER]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_augmentation_keeps_type_and_range_and_moves_labels_with_the_image(change, window):
    for seed in range(10):
        images, labels = change(*window, np.random.default_rng(seed))
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.shape[-2:] == labels.shape[-2:]
        assert images.min() >= 0 and images.max() <= 1
        assert set(labels.unique().tolist()) <= {IGNORED, 0, 1}
        if change.__name__ not in ("erase", "paper"):
            # The bright square is where the labels are 1.
            assert images[:, 0][labels == 1].mean() > images[:, 0][labels == 0].mean() + 0.1


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_augmentation_depends_on_its_seed_alone(change, window):
    first, second = (change(*window, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_gentle_changes_move_and_tone_each_window_by_itself(window, monkeypatch: pytest.MonkeyPatch):
    """Several windows at once are changed as one after another, but for their noise."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    images, labels = (torch.stack([part] * 12) for part in window)
    together, moved = gentle(images, labels, np.random.default_rng(3))
    assert len({part.numpy().tobytes() for part in together}) > 8
    rng: Any = _NoNoise(np.random.default_rng(3))
    for index in range(12):
        (one,), (truth,) = gentle(images[:1], labels[:1], rng)
        assert torch.equal(truth, moved[index])
        torch.testing.assert_close(one, together[index])


class _NoNoise:
    """Draws as a generator does, but never a seed for noise."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.random, self.uniform = rng.random, rng.uniform

    def integers(self, _: int) -> int:
        return 0


def test_there_are_ten_augmentations_to_choose_two_from():
    assert len(EITHER) == 10


def test_a_warp_moves_pixels_and_labels_alike():
    images = torch.arange(6.0).reshape(1, 1, 2, 3) / 6
    labels = torch.arange(6).reshape(1, 2, 3)
    moved, moved_labels = warp(images, labels, [[1, 0, 1], [0, 1, 0]])  # each pixel comes from its right neighbour
    assert moved_labels.tolist() == [[[1, 2, 0], [4, 5, 0]]]
    torch.testing.assert_close(moved * 6, torch.tensor([[[[1.0, 2, 0], [4, 5, 0]]]]))


def test_erased_rectangles_have_the_expected_size():
    images, labels = torch.zeros(1, 1, 100, 100), torch.ones(1, 100, 100, dtype=torch.long)
    for seed in range(20):
        _, erased = erase(images, labels, np.random.default_rng(seed))
        assert 0.018 <= (erased == 0).float().mean() <= 0.052


def read(site: Path, samples: Samples):
    (case,) = folders.read(site.parent).cases
    return prepare(case, label_map(Data(path=site.parent, labels={"ball": 1, "core": 2}), "a"), samples, site / "cache")


def test_a_prepared_case_has_the_windows_of_its_volume(tmp_path: Path):
    site = make_site(tmp_path / "a", 1)
    samples = Samples()
    prepared = read(site, samples)
    (case,) = folders.read(tmp_path).cases
    from flapsam.volumes import read_image, read_label

    expected, truth = stack_of(read_image(case.image), samples), stack_of(read_label(case.label), samples)
    assert prepared.slices == len(expected) == 6
    for centre in range(6):
        images, labels = prepared.window(centre, 5, samples)
        assert torch.equal(images, expected.window(centre, 5))
        indices = np.clip(np.arange(centre - 2, centre + 3), 0, 5)
        np.testing.assert_array_equal(labels, truth.images[indices])


def test_a_changed_file_is_prepared_again(tmp_path: Path):
    site = make_site(tmp_path / "a", 1)
    before = np.array(read(site, Samples()).stack(Samples()).images)
    save((before * 0).transpose(1, 2, 0), site / "images" / "a_0.nii.gz", AFFINE)
    assert np.array(read(site, Samples()).stack(Samples()).images).max() == 0


def test_labels_that_do_not_match_their_image_are_refused(tmp_path: Path):
    site = make_site(tmp_path / "a", 1)
    label = site / "labels" / "a_0.nii.gz"
    save(np.zeros((20, 16, 5), np.uint8), label)
    with pytest.raises(FlapsamError, match=r"a_0\.nii\.gz: its shape \(20, 16, 5\) differs"):
        read(site, Samples())
    moved = AFFINE.copy()
    moved[2, 3] = 3
    save(np.zeros((20, 16, 6), np.uint8), label, moved)
    with pytest.raises(FlapsamError, match="its affine differs"):
        read(site, Samples())


def test_unannotated_background_stays_ignored_through_preparation(tmp_path: Path):
    site = make_site(tmp_path / "a", 1)
    (case,) = folders.read(tmp_path).cases
    mapping = LabelMap(("ball", "core"), {0: 0, 1: 1, 2: 1}, frozenset({1}))
    prepared = prepare(case, mapping, Samples(), tmp_path / "cache")
    # Scores need to know that the background is not the ball. The loss leaves it out.
    assert set(np.unique(prepared.labels())) == {HIDDEN, 1}
    assert set(np.unique(prepared.window_labels(3, 5))) == {IGNORED, 1}
    assert site.exists()


class Brightest(torch.nn.Module):
    """A network without parameters that predicts class 1 where a pixel is above 0.5."""

    image_size = 64
    masks = 2
    reach = 0
    pixel_mean = torch.zeros(1)

    def embed(self, images: Tensor, depth: int | None = None) -> Tensor:
        return images[:, :1]

    def logits(self, embedding: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(embedding), 40 * (embedding - 0.5)], dim=1)


@pytest.mark.parametrize("codes", ["RAS", "LPI", "IPL", "SAR"])
@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_label_maps_lie_on_their_image_in_every_orientation(codes: str, resize: str):
    from tests.volumes.test_volumes import stored_as

    array = np.zeros((40, 30, 8), np.float32)
    array[8:24, 12:20, 2:7] = 1
    stored = stored_as(codes, Volume(array, np.diag([1.0, 1, 2, 1])))
    samples = Samples.model_validate({"scaling": "volume", "resize": resize})
    labels = predict_volume(Brightest(), stored, samples, batch=3).labels  # type: ignore[arg-type]
    assert labels.shape == stored.array.shape
    assert (labels == (stored.array > 0.5)).mean() > 0.99
