"""Two ways of training, compared case by case."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over cases, with a 95 % interval over subjects."""

    mean: float
    low: float | None
    """None where there are fewer than two subjects."""
    high: float | None
    cases: int
    subjects: int


def compare(first: Mapping[str, float], second: Mapping[str, float], subjects: Mapping[str, str]) -> Difference | None:
    """How much better ``first`` is than ``second`` on the cases that both have; None if there are none.

    The interval is a percentile bootstrap that draws whole subjects, since cases of one subject, and runs of one case under
    several seeds, are not independent (Efron & Tibshirani 1993, chapter 13).

    Args:
        first: run and case → score.
        second: the same keys, or some of them.
        subjects: each key's subject.
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
        found = bootstrap(
            (sums, counts), _mean, n_resamples=RESAMPLES, paired=True, vectorized=True, method="percentile", rng=0
        ).confidence_interval
        interval = (float(found.low), float(found.high))
    return Difference(float(sums.sum() / counts.sum()), *interval, int(counts.sum()), len(groups))


def _mean(sums: NDArray, counts: NDArray, axis: int = -1) -> NDArray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)
