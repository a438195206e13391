"""How certain a segmentation is. Expected values are from arithmetic by hand, and from SciPy's entropy."""

import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from flapsam.learning.confidence import CERTAIN, Line, Reliability, entropy, expected_dice


def stored(probabilities: list) -> np.ndarray:
    return (np.array(probabilities) * CERTAIN).round().astype(np.uint16)


def test_entropy_is_0_where_one_class_is_certain_and_255_where_all_are_equal():
    values = stored([[[[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0], [0.7, 0.2, 0.1]]]])
    by_scipy = [scipy_entropy(shares) / np.log(3) * 255 for shares in ([1, 0, 0], [1, 1, 1], [1, 1, 0], [7, 2, 1])]
    assert entropy(values)[0, 0].tolist() == np.round(by_scipy).astype(int).tolist() == [0, 255, 161, 186]


def test_the_dice_to_expect_is_that_of_a_calculation_by_hand():
    # Class 1 is in the first two voxels: 2 · (0.9 + 0.6) / (2 + 0.9 + 0.6 + 0.2 + 0.1). Class 2 is nowhere.
    shares = stored([[[[0.1, 0.9, 0], [0.4, 0.6, 0], [0.8, 0.2, 0], [0.9, 0.1, 0]]]])
    labels = np.array([[[1, 1, 0, 0]]], np.uint8)
    assert expected_dice(labels, shares) == [pytest.approx(3 / 3.8, abs=1e-4), None]
    # A label map that was cleaned has lost the class, and the probabilities still expect it.
    assert expected_dice(np.zeros_like(labels), shares) == [0, None]
    certain = stored([[[[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]]])
    assert expected_dice(np.array([[[1, 1, 0, 2]]], np.uint8), certain) == [1, 1]


def test_the_line_and_its_interval_are_those_of_a_statistics_library():
    from scipy.stats import t

    x, y = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95], [0.45, 0.65, 0.62, 0.83, 0.85, 0.9]
    line, known = Line.through(x, y), np.polynomial.Polynomial.fit(x, y, 1)
    estimate = known(0.75)
    rest = np.array(y) - known(np.array(x))
    away = 1 + 1 / 6 + (0.75 - np.mean(x)) ** 2 / np.square(np.array(x) - np.mean(x)).sum()
    reach = t.ppf(0.975, 4) * np.sqrt((rest**2).sum() / 4 * away)
    assert line.dice(0.75) == pytest.approx((estimate, estimate - reach, min(estimate + reach, 1)))


def test_more_certainty_never_means_a_lower_dice():
    falling, level = Line.through([0.5, 0.6, 0.7, 0.8, 0.9], [0.9, 0.8, 0.7, 0.6, 0.5]), Line.through([0.8] * 5, [0.7] * 5)
    assert falling.slope == level.slope == 0
    assert falling.dice(0.9)[0] == pytest.approx(0.7)
    assert level.dice(0.2) == pytest.approx((0.7, 0.7, 0.7))


def test_dice_and_interval_stay_between_0_and_1():
    steep = Line.through([0.8, 0.85, 0.9, 0.95, 1.0], [0.1, 0.3, 0.6, 0.8, 1.0])
    for expected in (0.0, 0.5, 1.0):
        estimate, low, high = steep.dice(expected)
        assert 0 <= low <= 1 and 0 <= estimate <= 1 and 0 <= high <= 1


def test_brier_score_and_calibration_error_are_those_of_a_calculation_by_hand():
    # The last voxel is surely background, and the one before is ignored.
    shares = stored([[[[0.2, 0.8, 0], [0.4, 0.6, 0], [0.3, 0.1, 0.6], [0, 0.9, 0.1], [0.995, 0.005, 0]]]])
    reliability = Reliability()
    reliability.add(shares, np.array([[[1, 0, 2, -100, 1]]]))
    squares = (0.04 + 0.04) + (0.36 + 0.36) + (0.09 + 0.01 + 0.16)
    assert reliability.brier == pytest.approx(squares / 3, abs=1e-4)
    # 0.8 is right, and one of two with 0.6 is: |1 − 0.8| and |1 − 1.2|.
    assert reliability.error == pytest.approx((0.2 + 0.2) / 3, abs=1e-4)
    assert [(round(p, 2), right, count) for p, right, count in reliability.table()] == [(0.6, 0.5, 2), (0.8, 1, 1)]
    assert Reliability().brier is Reliability().error is None


def test_the_calibration_error_is_monais():
    import torch
    from monai.metrics.calibration import calibration_binning

    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1, 1, 1], (20, 20, 5))
    truth = np.array([[[rng.choice(3, p=p) for p in row] for row in plane] for plane in shares])
    reliability = Reliability()
    reliability.add(stored(shares.tolist()), truth)
    counted = shares[..., 0] < 0.99
    top, right = shares.max(-1)[counted], shares.argmax(-1)[counted] == truth[counted]
    means, hits, counts = calibration_binning(
        torch.tensor(top)[None, None, :, None], torch.tensor(right)[None, None, :, None].double(), num_bins=10
    )
    known = counts.nan_to_num() > 0
    expected = (counts * (means - hits).abs())[known].sum() / counts[known].sum()
    assert reliability.error == pytest.approx(float(expected), abs=2e-3)
