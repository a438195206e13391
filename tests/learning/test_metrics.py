import numpy as np
import pytest

from flapsam.learning.metrics import CaseScores, by_site, dice, hd95, mean, score_case, summarise


def box(*ranges: tuple[int, int], shape: tuple[int, ...] = (12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*pair) for pair in ranges)] = True
    return mask


def test_dice_of_two_boxes_matches_the_value_by_hand():
    # Boxes of 8 and 16 voxels share 8 of them: 2 · 8 / 24.
    assert dice(box((0, 2), (0, 2), (0, 2)), box((0, 4), (0, 2), (0, 2))) == pytest.approx(2 / 3)


def test_dice_is_1_if_both_masks_are_empty_and_0_if_one_is():
    empty, filled = box((0, 0), (0, 0), (0, 0)), box((0, 2), (0, 2), (0, 2))
    assert dice(empty, empty) == 1
    assert dice(empty, filled) == 0
    assert dice(filled, empty) == 0


def test_hd95_of_shifted_boxes_is_the_shift_in_mm():
    first, second = box((2, 6), (2, 6), (2, 6)), box((2, 6), (2, 6), (4, 8))
    # The shift is two voxels of 2.5 mm along the last axis.
    assert hd95(first, second, (1, 1, 2.5)) == pytest.approx(5.0)
    assert hd95(first, first, (1, 1, 1)) == 0


def test_hd95_matches_scipy():
    """The expected value is the larger of both directed 95th percentiles, computed with a distance transform."""
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


def test_hd95_of_an_empty_mask_is_undefined():
    empty, filled = box((0, 0), (0, 0), (0, 0)), box((0, 2), (0, 2), (0, 2))
    assert hd95(empty, filled, (1, 1, 1)) is None
    assert hd95(empty, empty, (1, 1, 1)) is None


def test_a_class_that_is_not_annotated_is_not_scored():
    truth = np.full((4, 4, 4), -100)
    truth[0] = 1
    scores = score_case("c", "s", (truth == 1).astype(np.uint8), truth, (1, 1, 1), ["a", "b"], annotated={1})
    assert scores.dice == {"a": 1.0, "b": None}
    assert scores.hd95 == {"a": 0.0, "b": None}


def test_means_leave_out_missing_scores():
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
