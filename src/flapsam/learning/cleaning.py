"""Clean up a label map without looking at the image: an organ is one piece and has no holes."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), bool)
"""Connectivity of components: voxels that share a face, an edge or a corner are connected."""


def keep_largest(labels: NDArray[np.uint8]) -> None:
    """Keep the largest connected component of every class, in place. The rest becomes background.

    Args:
        labels: class indices (i, j, k).
    """
    for value, box in _boxes(labels):
        parts, count = ndimage.label(labels[box] == value, TOUCHING)  # pyright: ignore[reportGeneralTypeIssues]
        if count > 1:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            labels[box][(parts != 0) & (parts != sizes.argmax())] = 0


def fill_holes(labels: NDArray[np.uint8]) -> None:
    """Assign background that a class encloses to that class, in place. Enclosed voxels of other classes stay.

    Args:
        labels: class indices (i, j, k).
    """
    for value, box in _boxes(labels):
        inside = ndimage.binary_fill_holes(labels[box] == value)
        labels[box][inside & (labels[box] == 0)] = value


def _boxes(labels: NDArray[np.uint8]) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Yield every class that occurs, with the smallest box around it."""
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            yield value, box
