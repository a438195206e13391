"""Randomness that protects patients."""

import numpy as np
import pytest
from scipy import stats

from flapsam.base.randomness import AT_ONCE, SystemRandomness, normal, uniform
from tests.helpers.randomness import Seeded


class Constant:
    """A source whose bits are all the same."""

    def __init__(self, byte: bytes) -> None:
        self.byte = byte

    def bytes(self, count: int) -> bytes:
        return self.byte * count


def test_uniform_numbers_are_uniform_and_never_0():
    numbers = uniform(Seeded(), 100_000)
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    assert uniform(Constant(b"\0"), 1) == 2.0**-53
    assert uniform(Constant(b"\xff"), 1) == 1


@pytest.mark.parametrize("count", [0, 1, 1000, AT_ONCE + 5])
def test_as_many_numbers_are_drawn_as_asked(count: int):
    assert normal(Seeded(), count).shape == (count,)


def test_normal_numbers_have_the_standard_normal_distribution():
    numbers = normal(Seeded(), 200_000)
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    # The fourth moment of the standard normal distribution is 3, and the standard error of this estimate is 0.022.
    assert (numbers**4).mean() == pytest.approx(3, abs=0.1)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    # The most extreme numbers that a source can bring are finite.
    assert np.isfinite(normal(Constant(b"\0"), 1)).all() and np.isfinite(normal(Constant(b"\xff"), 1)).all()


def test_the_system_repeats_nothing():
    first, second = (normal(SystemRandomness(), 100) for _ in range(2))
    assert not np.intersect1d(first, second).size
