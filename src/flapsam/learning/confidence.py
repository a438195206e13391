"""How certain a segmentation is: by voxel, and for a case as an expected Dice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flapsam.learning.metrics.interval import t_interval

CERTAIN = 65535
"""Stored value of probability 1."""
MOST_UNCERTAIN = 255
"""Stored value of the entropy of equal probabilities."""
SURELY = 0.99
"""Probability of background from which on a voxel does not count in a reliability table."""
BINS = 10
"""Number of ranges of probabilities in a reliability table."""
FEWEST = 5
"""Smallest number of patients from whose scores a line says anything."""


def entropy(probabilities: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Entropy of every voxel's class probabilities, divided by that of equal probabilities.

    Args:
        probabilities: probabilities (i, j, k, class), where 65535 stands for 1.

    Returns:
        Entropy (i, j, k), where 255 stands for equal probabilities.
    """
    shape, most = probabilities.shape[:3], np.log(probabilities.shape[3])
    result = np.empty(shape, np.uint8)
    # Slice by slice, so that only one slice is kept in floating point.
    for k in range(shape[2]):
        shares = probabilities[:, :, k].astype(np.float32)
        # Averages over planes are rounded, so that they do not add up to 1 exactly.
        shares /= np.maximum(shares.sum(axis=-1, keepdims=True), 1)
        terms = shares * np.log(np.where(shares > 0, shares, 1))
        result[:, :, k] = (terms.sum(axis=-1) * (-MOST_UNCERTAIN / most)).clip(0, MOST_UNCERTAIN).round()
    return result


def expected_dice(labels: NDArray[np.uint8], probabilities: NDArray[np.uint16]) -> list[float | None]:
    """The expected Dice of each class if the probabilities are right: 2·Σp(in the label map) / (voxels + Σp).

    This is the soft Dice confidence of Borges, Pacheco and Silva 2025 (arXiv 2402.10665), for one class at a time.

    Args:
        labels: predicted class indices (i, j, k).
        probabilities: probabilities (i, j, k, class), where 65535 stands for 1.

    Returns:
        One value for each class but the background; None if no voxel has a share of the class worth half a voxel in all.
    """
    classes = probabilities.shape[3]
    inside, everywhere, voxels = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    for k in range(labels.shape[2]):
        shares = probabilities[:, :, k].astype(np.float64) / CERTAIN
        everywhere += shares.sum(axis=(0, 1))
        for value in range(1, classes):
            mask = labels[:, :, k] == value
            voxels[value] += mask.sum()
            inside[value] += shares[..., value][mask].sum()
    return [
        float(2 * inside[value] / (voxels[value] + everywhere[value])) if voxels[value] + everywhere[value] > 0.5 else None
        for value in range(1, classes)
    ]


@dataclass(frozen=True)
class Line:
    """A straight line through patients' points of expected and measured Dice, by least squares."""

    patients: int
    """Number of points."""
    centre: float
    """Mean expected Dice."""
    level: float
    """Mean measured Dice."""
    slope: float
    spread: float
    """Sum of the squared distances of expected Dices from ``centre``."""
    error: float
    """Standard deviation of the measured Dices around the line."""

    @classmethod
    def through(cls, expected: Sequence[float], measured: Sequence[float]) -> "Line":
        """The line through at least ``FEWEST`` points.

        The slope is at least 0, because more certainty never means a worse segmentation, and 0 where all points have one
        expected Dice.
        """
        x, y = np.asarray(expected, float), np.asarray(measured, float)
        centre, level = float(x.mean()), float(y.mean())
        spread = float(((x - centre) ** 2).sum())
        slope = max(float(((x - centre) * (y - level)).sum()) / spread, 0.0) if spread > 0 else 0.0
        rest = y - level - slope * (x - centre)
        return cls(len(x), centre, level, slope, spread, float(np.sqrt((rest**2).sum() / (len(x) - 2))))

    def dice(self, expected: float) -> tuple[float, float, float]:
        """The Dice of a new patient: its estimate, and a 95 % prediction interval by Student's t, from 0 to 1."""
        away = expected - self.centre
        lever = away**2 / self.spread if self.spread > 0 else 0.0
        estimate = self.level + self.slope * away
        low, high = t_interval(estimate, self.error * math.sqrt(1 + 1 / self.patients + lever), self.patients - 2)
        estimate, low, high = (min(max(value, 0.0), 1.0) for value in (estimate, low, high))
        return estimate, low, high


class Reliability:
    """How often predictions of a probability are right, over the voxels that may be a class.

    A well calibrated network is right in 80 % of the voxels to which it gives a probability of 80 %. Voxels that are
    background with a probability of at least ``SURELY`` are left out, because there are so many of them. The truth must not
    decide what is left out, or the network would seem to be wrong too often.
    """

    def __init__(self) -> None:
        """Start without voxels."""
        self.voxels = np.zeros(BINS, np.int64)
        """Number of voxels in each of ``BINS`` equal ranges of the predicted class's probability."""
        self.right = np.zeros(BINS, np.int64)
        """Number of them in which the predicted class is the true one."""
        self.confidence = np.zeros(BINS)
        """Sum of their probabilities of the predicted class."""
        self.squares = 0.0
        """Sum over voxels and classes of the squared difference between the probability and 1 or 0."""

    def add(self, probabilities: NDArray[np.uint16], truth: NDArray) -> None:
        """Add a case.

        Args:
            probabilities: probabilities (i, j, k, class), where 65535 stands for 1.
            truth: true class indices (i, j, k). Negative ones are left out.
        """
        for k in range(truth.shape[2]):
            shares, true = probabilities[:, :, k].astype(np.float64) / CERTAIN, truth[:, :, k]
            counted = (true >= 0) & (shares[..., 0] < SURELY)
            shares, true = shares[counted], true[counted]
            predicted = shares.argmax(axis=-1)
            highest = shares.max(axis=-1, initial=0)
            bins = np.minimum((highest * BINS).astype(int), BINS - 1)
            self.voxels += np.bincount(bins, minlength=BINS)
            self.right += np.bincount(bins[predicted == true], minlength=BINS)
            self.confidence += np.bincount(bins, highest, minlength=BINS)
            self.squares += float(((shares - np.eye(probabilities.shape[3])[true]) ** 2).sum())

    @property
    def brier(self) -> float | None:
        """Brier score (Brier 1950), from 0 to 2: the mean of the squares over the voxels; None without voxels."""
        return self.squares / int(self.voxels.sum()) if self.voxels.any() else None

    @property
    def error(self) -> float | None:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3); None without voxels."""
        return float(np.abs(self.right - self.confidence).sum() / self.voxels.sum()) if self.voxels.any() else None

    def table(self) -> list[tuple[float, float, int]]:
        """Mean probability, share that is right, and number of voxels of each range that has any."""
        return [
            (float(self.confidence[one] / count), float(self.right[one] / count), int(count))
            for one, count in enumerate(self.voxels)
            if count
        ]
