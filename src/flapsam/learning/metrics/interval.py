"""The interval of a mean over cases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
FEW = 50
"""With fewer patients than this, an interval is wide and says little about other patients."""


@dataclass(frozen=True)
class Mean:
    """A mean over cases with its 95 % interval over patients."""

    value: float
    low: float | None
    """Lower end of the interval; None with fewer than two patients, as ``high`` is."""
    high: float | None
    cases: int
    """Number of cases that have a value."""
    patients: int
    """Number of patients that these cases are of."""


def mean_of(
    values: Sequence[Mapping[str, float]], patients: Mapping[str, str], highest: float = 1.0, lowest: float = 0.0
) -> Mean | None:
    """Mean of the structures' means over their cases, with a t-interval over patients; None if there is no value.

    Cases of one patient are not independent. The standard error is that of a mean of patients' shares in the result (the
    cluster-robust variance with P / (P − 1); Cameron & Miller 2015, equation 7). With one case per patient and one
    structure it is the textbook's s / √n. ``benchmarks/intervals.py`` measures how often such intervals hold the true mean.

    Args:
        values: for each structure, its cases' values. Structures without a value are left out.
        patients: case → patient.
        highest: largest possible value, at which the interval is cut.
        lowest: smallest possible value.
    """
    values = [cases for cases in values if cases]
    if not values:
        return None
    means = [math.fsum(cases.values()) / len(cases) for cases in values]
    mean = math.fsum(means) / len(means)
    # What a patient adds to the difference from the mean. The sum over all patients is 0.
    shares = {patients[case]: 0.0 for cases in values for case in cases}
    for cases, centre in zip(values, means, strict=True):
        for case, value in cases.items():
            shares[patients[case]] += (value - centre) / len(cases) / len(means)
    count = len(shares)
    low = high = None
    if count > 1:
        error = math.sqrt(count / (count - 1)) * float(np.linalg.norm(list(shares.values())))
        reach = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
        low, high = max(lowest, mean - reach), min(highest, mean + reach)
    return Mean(mean, low, high, len({case for cases in values for case in cases}), count)
