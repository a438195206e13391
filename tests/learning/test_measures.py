"""Every measure against an independent implementation, on made-up pairs of masks."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import surface_distance as deepmind
from scipy import ndimage

from flapsam.learning.metrics import MEASURES, measures, score_case, summarise
from flapsam.run.config import Evaluation, RunConfig

TOLERANCE = 2.0


def made_up(number: int) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Two masks of several balls, and a spacing. Some touch the border, some are single voxels, some are empty."""
    rng = np.random.default_rng(number)
    shape = tuple(int(side) for side in rng.integers(6, 24, 3))
    spacing = tuple(float(step) for step in rng.choice([0.7, 1.0, 1.5, 3.0, 5.0], 3))
    grid = np.indices(shape)
    masks = []
    for _ in range(2):
        mask = np.zeros(shape, bool)
        for _ in range(rng.integers(1, 4)):
            centre = rng.uniform(0, shape)
            mask |= ((grid - centre[:, None, None, None]) ** 2).sum(0) < rng.uniform(2, 8) ** 2
        masks.append(mask)
    kind = number % 8
    if kind == 0:
        masks[number // 8 % 2][:] = False
    if kind == 1:
        masks[0][:] = False
        masks[0][tuple(int(side) for side in rng.integers(0, shape))] = True
    if kind == 2:
        masks[1] = masks[0].copy()
    if kind == 3 and number // 8 % 2:
        masks[0][:] = masks[1][:] = False
    return masks[0], masks[1], spacing


PAIRS = [made_up(number) for number in range(200)]


def directed(predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> list[np.ndarray]:
    """Distances from the voxels of each surface to the other surface, by a distance transform of scipy."""
    surfaces = [mask & np.logical_not(ndimage.binary_erosion(mask)) for mask in (predicted, truth)]
    fields = [np.asarray(ndimage.distance_transform_edt(np.logical_not(surface), sampling=spacing)) for surface in surfaces]
    return [fields[1][surfaces[0]], fields[0][surfaces[1]]]


def lesions(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F1 of lesions, pair by pair."""
    parts = []
    for mask in (predicted, truth):
        labelled = np.zeros(mask.shape, int)
        ndimage.label(mask, np.ones((3, 3, 3)), output=labelled)
        parts.append([labelled == number for number in range(1, labelled.max() + 1)])
    found = sum((one & other).sum() > 0.5 * (one | other).sum() for one in parts[0] for other in parts[1])
    return 2 * int(found) / (len(parts[0]) + len(parts[1]))


def expected(predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float | None]:
    """Measure → value. None stands for none, where both masks are empty."""
    if not predicted.any() and not truth.any():
        return dict.fromkeys(MEASURES)
    if not predicted.any() or not truth.any():
        far = math.dist((0, 0, 0), [(side - 1) * step for side, step in zip(truth.shape, spacing, strict=True)])
        return {
            "dice": 0,
            "surface_dice": 0,
            "hd95": far,
            "surface_distance": far,
            "volume_error": 1,
            "lesion_f1": 0,
        }
    surfaces = deepmind.compute_surface_distances(truth, predicted, spacing)
    distances = directed(predicted, truth, spacing)
    a, b = predicted.sum(), truth.sum()
    return {
        "dice": deepmind.compute_dice_coefficient(truth, predicted),
        "surface_dice": deepmind.compute_surface_dice_at_tolerance(surfaces, TOLERANCE),
        "hd95": max(np.percentile(part, 95) for part in distances),
        "surface_distance": np.concatenate(distances).mean(),
        "volume_error": abs(a - b) / (a + b),
        "lesion_f1": lesions(predicted, truth),
    }


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_matches_an_independent_implementation(measure: str):
    """DeepMind's ``surface-distance`` for both Dices, and scipy's distance transform for both distances."""
    options = [(TOLERANCE,)] if measure == "surface_dice" else [()]
    in_space = measure in ("surface_dice", "hd95", "surface_distance")
    for number, (predicted, truth, spacing) in enumerate(PAIRS):
        arguments = (predicted, truth, spacing, *options[0]) if in_space else (predicted, truth)
        value = getattr(measures, measure)(*arguments)
        want = expected(predicted, truth, spacing)[measure]
        assert value == (want if want is None else pytest.approx(want, abs=1e-6, rel=1e-6)), number


def test_whoever_misses_a_structure_gets_the_worst_value():
    """An empty prediction in place of any other never improves a measure."""
    evaluation = Evaluation(tolerance=TOLERANCE, lesions=["organ"])
    for number, (predicted, truth, spacing) in enumerate(PAIRS):
        if truth.any():
            some, none = (
                score_case("case", "site", shown.astype(int), truth.astype(int), spacing, ["organ"], evaluation=evaluation)
                for shown in (predicted, np.zeros_like(predicted))
            )
            assert none.outcome == {"organ": "missed"}
            for name, measure in MEASURES.items():
                better, worse = some.values(name)["organ"], none.values(name)["organ"]
                assert better is not None and worse is not None
                assert better >= worse if measure.more_is_better else better <= worse, (number, name)


def test_a_single_slice_is_measured_in_2d():
    """By hand: a square of 20 × 20 pixels of 1 mm that is shifted by 4 mm. In 3-D, all of it would be surface."""
    truth, predicted = np.zeros((2, 40, 40, 1), bool)
    truth[10:30, 10:30], predicted[14:34, 10:30] = True, True
    spacing = (1.0, 1.0, 5.0)
    assert measures.hd95(predicted, truth, spacing) == 4
    distances = directed(predicted[..., 0], truth[..., 0], spacing[:2])
    assert measures.surface_distance(predicted, truth, spacing) == pytest.approx(np.concatenate(distances).mean())
    assert measures.surface_dice(predicted, truth, spacing, 4.5) == 1


FLAMBY = Evaluation(
    regions={"kidney_and_tumour": ["kidney", "tumour"]},
    means={"FLamby": ["kidney_and_tumour", "tumour"], "paper": ["kidney", "tumour"]},
)


def test_the_metrics_of_flamby_and_of_the_paper_match_values_by_hand():
    """FLamby's metric for Fed-KiTS19 is the mean of the Dices of kidney with tumour and of tumour alone.

    Of ten voxels, six are kidney and two tumour. The prediction has five of kidney, all right, and three of tumour, of which
    two are right. Kidney with tumour: 2 · 8 / (8 + 8) = 1. Tumour: 2 · 2 / (2 + 3) = 0.8. Kidney: 2 · 5 / (6 + 5) = 10/11.
    """
    truth = np.array([1, 1, 1, 1, 1, 1, 2, 2, 0, 0]).reshape(10, 1, 1)
    predicted = np.array([1, 1, 1, 1, 1, 2, 2, 2, 0, 0]).reshape(10, 1, 1)
    scores = score_case("case", "site", predicted, truth, (1, 1, 1), ["kidney", "tumour"], evaluation=FLAMBY)
    assert scores.dice == {"kidney": pytest.approx(10 / 11), "tumour": pytest.approx(0.8), "kidney_and_tumour": 1}
    assert scores.means == {"FLamby": pytest.approx(0.9), "paper": pytest.approx((10 / 11 + 0.8) / 2)}
    # A region is no part of the mean over the classes.
    assert summarise([scores]).mean_dice == pytest.approx((10 / 11 + 0.8) / 2)


def test_a_region_with_a_class_that_the_site_does_not_annotate_has_no_score():
    labels = np.ones((4, 4, 4), int)
    scores = score_case("case", "site", labels, labels, (1, 1, 1), ["kidney", "tumour"], [1], evaluation=FLAMBY)
    assert (scores.dice["kidney"], scores.dice["kidney_and_tumour"], scores.outcome["kidney_and_tumour"]) == (1, None, None)


def test_each_class_has_its_own_tolerance():
    """Boxes that are shifted by two voxels of 1 mm."""
    truth, predicted = np.zeros((2, 16, 16, 16), int)
    truth[4:10, 4:10, 4:10], predicted[6:12, 4:10, 4:10] = 1, 1
    values = [
        score_case("c", "s", predicted, truth, (1, 1, 1), ["a"], evaluation=Evaluation(tolerance=one)).surface_dice["a"]
        for one in (2.0, {"a": 2.0}, {"a": 0.5})
    ]
    assert values[0] == values[1] == 1 and values[2] is not None and values[2] < 0.8


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"regions": {"kidney": ["tumour"]}}, "evaluation.regions: kidney is taken by a class"),
        ({"regions": {"all": ["kidney", "cyst"]}}, "evaluation.regions.all: cyst is not among the classes"),
        ({"lesions": ["cyst"]}, "evaluation.lesions: cyst is not among the classes and regions"),
        ({"means": {"FLamby": ["cyst"]}}, "evaluation.means.FLamby: cyst is not among"),
        ({"tolerance": {"cyst": 1.0}}, "evaluation.tolerance: cyst is not among"),
    ],
)
def test_a_name_that_is_no_class_is_refused(fields: dict[str, object], problem: str):
    tree = {"data": {"path": "data", "labels": {"kidney": 1, "tumour": 2}}, "evaluation": fields}
    with pytest.raises(ValueError, match=problem):
        RunConfig.model_validate(tree)
