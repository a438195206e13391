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
    """Lower end of the interval; None if a class has fewer than two patients, as ``high`` is."""
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
    fewest = len(shares)
    for cases, centre in zip(values, means, strict=True):
        count = len({patients[case] for case in cases})
        fewest = min(fewest, count)
        scale = math.sqrt(count / max(count - 1, 1)) / len(cases) / len(means)
        for case, value in cases.items():
            shares[patients[case]] += scale * (value - centre)
    low = high = None
    if fewest > 1:
        # As few degrees of freedom as the class in the fewest patients has.
        low, high = t_interval(mean, float(np.linalg.norm(list(shares.values()))), fewest - 1, highest, lowest)
    return Mean(mean, low, high, len({case for cases in values for case in cases}), len(shares))


def t_interval(mean: float, error: float, freedom: int, highest: float = 1.0, lowest: float = 0.0) -> tuple[float, float]:
    """The 95 % interval of Student's t.

    Args:
        mean: the mean.
        error: its standard error.
        freedom: degrees of freedom, at least 1.
        highest: largest possible value, at which the interval is cut.
        lowest: smallest possible value.
    """
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    return max(lowest, mean - reach), min(highest, mean + reach)
