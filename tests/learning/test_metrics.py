import numpy as np
import pytest

from flapsam.learning.metrics import CaseScores, by_site, dice, hd95, mean, score_case, summarise


def box(*ranges: tuple[int, int], shape: tuple[int, ...] = (12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*pair) for pair in ranges)] = True
    return mask


def test_dice_by_hand():
    # 8 voxels and 16 voxels share 8: 2 · 8 / 24.
    assert dice(box((0, 2), (0, 2), (0, 2)), box((0, 4), (0, 2), (0, 2))) == pytest.approx(2 / 3)


def test_dice_of_nothing():
    nothing, something = box((0, 0), (0, 0), (0, 0)), box((0, 2), (0, 2), (0, 2))
    assert dice(nothing, nothing) == 1
    assert dice(nothing, something) == 0
    assert dice(something, nothing) == 0


def test_distance_of_shifted_boxes_is_the_shift_in_mm():
    first, second = box((2, 6), (2, 6), (2, 6)), box((2, 6), (2, 6), (4, 8))
    # Along the last axis two voxels of 2.5 mm.
    assert hd95(first, second, (1, 1, 2.5)) == pytest.approx(5.0)
    assert hd95(first, first, (1, 1, 1)) == 0


def test_distance_against_scipy():
    """95th percentile of surface distances in both directions, the larger, worked out by a distance transform."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    rng = np.random.default_rng(0)
    grid = np.indices((24, 24, 24))
    blobs = [
        ((grid - c[:, None, None, None]) ** 2).sum(0) < 36 + 6 * rng.normal(size=(24, 24, 24))
        for c in rng.uniform(9, 14, (2, 3))
    ]
    spacing = (0.8, 1.1, 2.0)
    surfaces = [blob & np.logical_not(binary_erosion(blob)) for blob in blobs]
    distances = [np.asarray(distance_transform_edt(np.logical_not(surface), sampling=spacing)) for surface in surfaces]
    directed = [np.percentile(distances[1 - i][surfaces[i]], 95) for i in range(2)]
    assert hd95(blobs[0], blobs[1], spacing) == pytest.approx(max(directed), rel=1e-4)


def test_distance_of_nothing_is_left_out():
    nothing, something = box((0, 0), (0, 0), (0, 0)), box((0, 2), (0, 2), (0, 2))
    assert hd95(nothing, something, (1, 1, 1)) is None
    assert hd95(nothing, nothing, (1, 1, 1)) is None


def test_a_class_that_is_not_annotated_is_not_scored():
    truth = np.full((4, 4, 4), -100)
    truth[0] = 1
    scores = score_case("c", "s", (truth == 1).astype(np.uint8), truth, (1, 1, 1), ["a", "b"], annotated={1})
    assert scores.dice == {"a": 1.0, "b": None}
    assert scores.hd95 == {"a": 0.0, "b": None}


def test_means_leave_out_what_is_not_there():
    scores = [
        CaseScores("1", "x", {"a": 1.0, "b": None}, {"a": 2.0, "b": None}),
        CaseScores("2", "y", {"a": 0.5, "b": 0.25}, {"a": None, "b": 4.0}),
    ]
    summary = summarise(scores)
    assert summary.dice == {"a": 0.75, "b": 0.25}
    assert summary.hd95 == {"a": 2.0, "b": 4.0}
    assert summary.mean_dice == 0.5
    assert list(by_site(reversed(scores))) == ["x", "y"]
    assert mean([]) is None
