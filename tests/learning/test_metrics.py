import numpy as np
import pytest

from flapsam.learning.metrics import (
    CaseScores,
    by_site,
    dice,
    hd95,
    mean,
    missing_cases,
    rule_for_absent,
    score_case,
    summarise,
)
from flapsam.sites import HIDDEN, IGNORED


def box(*ranges: tuple[int, int], shape: tuple[int, ...] = (12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*pair) for pair in ranges)] = True
    return mask


def test_dice_of_two_boxes_matches_the_value_by_hand():
    # Boxes of 8 and 16 voxels share 8 of them: 2 · 8 / 24.
    assert dice(box((0, 2), (0, 2), (0, 2)), box((0, 4), (0, 2), (0, 2))) == pytest.approx(2 / 3)


def test_there_is_no_dice_if_both_masks_are_empty_and_it_is_0_if_one_is():
    empty, filled = box((0, 0), (0, 0), (0, 0)), box((0, 2), (0, 2), (0, 2))
    assert dice(empty, empty) is None
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


def test_hd95_of_a_missed_structure_is_the_diagonal_of_the_image():
    empty, filled = box((0, 0), (0, 0), (0, 0)), box((0, 2), (0, 2), (0, 2))
    # The centres of opposite corners are 11 voxels of 1, 2 and 2 mm apart: 11 · √9.
    assert hd95(empty, filled, (1, 2, 2)) == hd95(filled, empty, (1, 2, 2)) == pytest.approx(33)
    assert hd95(empty, empty, (1, 2, 2)) is None


def test_a_class_that_is_not_annotated_is_not_scored():
    truth = np.full((4, 4, 4), -100)
    truth[0] = 1
    scores = score_case("c", "s", (truth == 1).astype(np.uint8), truth, (1, 1, 1), ["a", "b"], annotated={1})
    assert scores.dice == {"a": 1.0, "b": None}
    assert scores.hd95 == {"a": 0.0, "b": None}


X = IGNORED
SCORED = {
    # truth, prediction → Dice of class 1 and of class 2, by counting 2·|P ∩ T| / (|P| + |T|) over the voxels that are known
    "wrong only where it is ignored": ([1, 1, X, X, 0, 0], [1, 1, 1, 0, 0, 0], 1.0, None),
    "a class predicted only where it is ignored": ([1, 1, X, X, 0, 0], [1, 1, 2, 2, 0, 0], 1.0, None),
    "a part of the class is ignored": ([1, 1, 1, X, 0, 2], [1, 1, 0, 1, 0, 2], 2 * 2 / 5, 1.0),
    "background is counted as such": ([1, 1, 0, 0, 0, 2], [1, 1, 1, 1, 0, 2], 2 * 2 / 6, 1.0),
    "all is ignored": ([X] * 6, [1, 2, 1, 2, 0, 0], None, None),
    "absent from both": ([1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], 2 / 3, None),
    "absent from the truth alone": ([1, 1, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0], 1.0, 0.0),
    "absent from the prediction alone": ([1, 1, 2, 0, 0, 0], [1, 1, 0, 0, 0, 0], 1.0, 0.0),
    "nothing anywhere": ([0] * 6, [0] * 6, None, None),
    "hidden background is no class": ([1, HIDDEN, HIDDEN, HIDDEN, X, X], [1, 1, 0, 0, 1, 0], 2 / 3, None),
}


@pytest.mark.parametrize(("truth", "predicted", "first", "second"), SCORED.values(), ids=SCORED)
def test_ignored_voxels_and_absent_classes_are_left_out(
    truth: list[int], predicted: list[int], first: float | None, second: float | None
):
    arrays = np.array(predicted, np.uint8)[:, None, None], np.array(truth, np.int8)[:, None, None]
    scores = score_case("c", "s", *arrays, None, ["a", "b"])
    assert scores.dice == {"a": pytest.approx(first), "b": pytest.approx(second)}
    assert scores.absent == "none"
    ones = score_case("c", "s", *arrays, None, ["a", "b"], absent="one")
    assert ones.dice == {name: 1.0 if value is None else value for name, value in scores.dice.items()}
    # A class that the site does not annotate has no Dice under either rule.
    assert score_case("c", "s", *arrays, None, ["a", "b"], {1}, "one").dice["b"] is None


def test_ignored_voxels_are_no_part_of_a_surface():
    truth = np.zeros((20, 12, 4), np.int8)
    truth[2:8], truth[14:] = 1, IGNORED
    predicted = np.where(truth == IGNORED, 1, truth).astype(np.uint8)
    assert score_case("c", "s", predicted, truth, (0.8, 0.8, 5), ["a"]).hd95 == {"a": 0.0}


def test_a_missing_prediction_scores_0_for_the_classes_of_its_truth_alone():
    truth = np.array([1, 1, 0, IGNORED], np.int8)[:, None, None]
    for absent in ("none", "one"):
        scores = score_case("c", "s", None, truth, (1, 1, 1), ["a", "b"], absent=absent)
        assert scores.dice == {"a": 0.0, "b": None}
        assert scores.outcome == {"a": "missed", "b": "absent"}
        assert scores.missing
        assert missing_cases([scores]) == ["s/c"]


def test_means_say_over_how_many_cases_they_are():
    scores = [
        CaseScores("1", "x", {"a": 1.0, "b": None}, {"a": 2.0, "b": None}, "none"),
        CaseScores("2", "x", {"a": 0.5, "b": 0.25}, {"a": None, "b": None}, "none"),
        CaseScores("3", "x", {"a": None, "b": None}, {"a": None, "b": None}, "none"),
    ]
    summary = summarise(scores)
    counts = {
        name: {part: one.cases if one else 0 for part, one in summary.measures[name].items()} for name in ("dice", "hd95")
    }
    assert (summary.cases, counts) == (3, {"dice": {"a": 2, "b": 1}, "hd95": {"a": 1, "b": 0}})
    # (1 + 0.5) / 2 = 0.75 and 0.25, whose mean is 0.5.
    assert summary.mean is not None and (summary.mean_dice, summary.mean.cases) == (0.5, 2)
    assert summary.hd95 == {"a": 2.0, "b": None}


def test_the_rule_for_absent_classes_is_named():
    none, one = CaseScores("1", "x", {}, {}, "none"), CaseScores("2", "x", {}, {}, "one")
    assert "has no Dice there" in rule_for_absent([none])
    assert "has a Dice of 1 there" in rule_for_absent([one])
    assert "as in earlier versions" in rule_for_absent([none, one])
    # Results of earlier versions do not say it.
    assert CaseScores("1", "x", {}, {}).absent == "one"


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
