"""Means over cases with their intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from flapsam.learning.metrics import CaseScores, Mean, few_patients, mean_of, spread, summarise

OWN = {str(number): f"patient {number}" for number in range(60)}


def test_the_interval_of_one_case_a_patient_is_the_t_interval_of_scipy():
    values = np.random.default_rng(0).uniform(0.2, 0.9, 14)
    mean = mean_of([{str(place): float(value) for place, value in enumerate(values)}], OWN)
    low, high = stats.t.interval(0.95, 13, values.mean(), stats.sem(values))
    assert mean is not None and (mean.cases, mean.patients) == (14, 14)
    assert (mean.value, mean.low, mean.high) == pytest.approx((values.mean(), low, high))


def test_several_cases_of_a_patient_count_as_one_patient():
    """By hand: patients with (0.4, 0.6), (0.8) and (0.6) and a mean of 0.6 add (−0.2, 0.2, 0) / 4 to the difference from it.
    The error is √(3/2 · 0.005) and t(2) = 4.3027."""
    patients = {"a": "one", "b": "one", "c": "two", "d": "three"}
    mean = mean_of([{"a": 0.4, "b": 0.6, "c": 0.8, "d": 0.6}], patients)
    reach = 4.302653 * math.sqrt(1.5 * 0.005)
    assert mean is not None and (mean.cases, mean.patients) == (4, 3)
    assert (mean.low, mean.high) == (pytest.approx(0.6 - reach), pytest.approx(0.6 + reach))


def test_the_interval_of_the_mean_over_classes_is_that_of_the_patients_means():
    rng = np.random.default_rng(1)
    first, second = rng.uniform(0.3, 0.8, (2, 20))
    values = [{str(place): float(value) for place, value in enumerate(part)} for part in (first, second)]
    mean, whole = mean_of(values, OWN), mean_of([{str(p): float(v) for p, v in enumerate((first + second) / 2)}], OWN)
    assert mean is not None and whole is not None
    assert (mean.value, mean.low, mean.high) == pytest.approx((whole.value, whole.low, whole.high))


def test_a_class_of_few_patients_makes_the_interval_wide():
    """What a class of one patient adds is unknown, so there is no interval. With two, there is one degree of freedom."""
    many = {str(number): 0.5 + 0.01 * number for number in range(20)}
    alone, pair = mean_of([many, {"0": 0.2}], OWN), mean_of([many, {"0": 0.2, "1": 0.4}], OWN)
    assert alone is not None and (alone.low, alone.high) == (None, None)
    assert pair is not None and pair.low is not None and pair.high is not None
    # Of the second class alone, the error is 0.1, of which half counts: 12.7 · 0.05 = 0.64.
    assert pair.high - pair.low > 0.9


def test_an_interval_ends_at_the_limits_and_needs_two_patients():
    assert mean_of([{"0": 1.0, "1": 0.7}], OWN) == Mean(0.85, 0.0, 1.0, 2, 2)
    assert mean_of([{"0": 0.5}], OWN) == Mean(0.5, None, None, 1, 1)
    assert mean_of([{}], OWN) is None
    distance = mean_of([{"0": 90.0, "1": 2.0}], OWN, math.inf)
    assert distance is not None and distance.high is not None and distance.high > 300


@pytest.mark.parametrize("patients", [12, 36, 100])
def test_the_interval_holds_the_true_mean_about_as_often_as_it_says(patients: int):
    """2,000 draws from a skewed distribution, as Dice has it; its mean is 5/6. ``benchmarks/intervals.py`` has more."""
    rng = np.random.default_rng(patients)
    held = 0
    for draw in rng.beta(10, 2, (2000, patients)):
        mean = mean_of(
            [{str(place): float(value) for place, value in enumerate(draw)}], {str(p): str(p) for p in range(100)}
        )
        assert mean is not None and mean.low is not None and mean.high is not None
        held += mean.low <= 5 / 6 <= mean.high
    assert 0.93 <= held / 2000 <= 0.97


def test_the_worst_site_is_named():
    scores = [
        CaseScores(str(n), site, {"a": dice}, {}) for n, (site, dice) in enumerate([("x", 0.5), ("x", 0.7), ("y", 0.9)])
    ]
    between = spread(scores)
    assert between is not None and (between.worst, between.best) == ("x", "y")
    assert between.gap == pytest.approx(0.3)
    assert spread(scores[:2]) is None


def test_few_patients_are_told():
    scores = [CaseScores(str(number), "x", {"a": 0.5}, {}) for number in range(50)]
    assert few_patients(summarise(scores[:49])).startswith("Only 49 patients")
    assert few_patients(summarise(scores)) == ""
