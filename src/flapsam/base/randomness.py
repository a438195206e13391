"""Randomness that protects patients: it comes from the operating system, and no seed repeats it."""

import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 1 << 18
"""Number of normal values that are drawn at once, to bound the memory."""


class Randomness(Protocol):
    """A source of random bytes."""

    def bytes(self, count: int) -> bytes:
        """Draw random bytes.

        Args:
            count: how many.
        """
        ...


class SystemRandomness:
    """The operating system's cryptographic generator."""

    def bytes(self, count: int) -> bytes:
        """Draw random bytes.

        Args:
            count: how many.
        """
        return os.urandom(count)


def uniform(source: Randomness, count: int) -> NDArray[np.float64]:
    """Draw numbers that are uniform in (0, 1], with 53 random bits each.

    Args:
        source: the source of randomness.
        count: how many.
    """
    bits = np.frombuffer(source.bytes(8 * count), np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53


def normal(source: Randomness, count: int) -> NDArray[np.float64]:
    """Draw numbers from the standard normal distribution.

    Each is half the sum of four numbers that the Box–Muller transform gives. From one such number, the last bits of what it
    was added to can be guessed (Mironov 2012). From a sum of four, they cannot in practice (Holohan and Braghin 2021, arXiv
    2107.10138).

    Args:
        source: the source of randomness.
        count: how many.
    """
    result = np.empty(count)
    for start in range(0, count, AT_ONCE):
        part = result[start : start + AT_ONCE]
        # A pair of uniform numbers gives two normal ones, and a value needs four.
        radii = np.sqrt(-2 * np.log(uniform(source, 2 * len(part)))).reshape(2, -1)
        angles = 2 * np.pi * uniform(source, 2 * len(part)).reshape(2, -1)
        part[:] = (radii * (np.cos(angles) + np.sin(angles))).sum(axis=0) / 2
    return result
