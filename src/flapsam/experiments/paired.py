"""Paired comparison of two ways of training, case by case."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, wilcoxon

RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over cases, with a 95 % bootstrap interval over subjects."""

    mean: float
    low: float | None
    """Lower end of the interval; None with fewer than two subjects, as ``high`` is."""
    high: float | None
    cases: int
    subjects: int
    p: float | None = None
    """p-value of Wilcoxon's signed-rank test on the subjects' means; None with fewer than two subjects."""


def compare(first: Mapping[str, float], second: Mapping[str, float], subjects: Mapping[str, str]) -> Difference | None:
    """Mean difference ``first`` − ``second`` over the cases that both have; None if they have none in common.

    The interval is a percentile bootstrap that resamples whole subjects, because cases of one subject, and results of one
    case under several seeds, are not independent (Efron & Tibshirani 1993, chapter 13).

    Args:
        first: score by case, or by seed and case.
        second: the scores to subtract, under the same keys.
        subjects: the subject of each key.
    """
    by_subject: dict[str, list[float]] = defaultdict(list)
    for key in first.keys() & second.keys():
        by_subject[subjects[key]].append(first[key] - second[key])
    if not by_subject:
        return None
    groups = [by_subject[subject] for subject in sorted(by_subject)]
    sums, counts = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    interval: tuple[float, float] | tuple[None, None] = (None, None)
    if len(groups) > 1:
        resampled = bootstrap(
            (sums, counts), _mean, n_resamples=RESAMPLES, paired=True, vectorized=True, method="percentile", rng=0
        ).confidence_interval
        interval = (float(resampled.low), float(resampled.high))
    means = sums / counts
    p = None
    if len(groups) > 1:
        # The test is not defined where nothing differs.
        p = float(np.asarray(wilcoxon(means))[1]) if means.any() else 1.0
    return Difference(float(sums.sum() / counts.sum()), *interval, int(counts.sum()), len(groups), p)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values that are corrected for as many comparisons (Holm 1979). None stays None and counts for nothing."""
    order = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        corrected[place] = largest
    return corrected


def _mean(sums: NDArray, counts: NDArray, axis: int = -1) -> NDArray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)
