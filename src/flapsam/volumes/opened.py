"""An image between its header and its voxels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flapsam.volumes.volume import Geometry


@dataclass(frozen=True)
class Opened:
    """An image whose header was checked, and whose voxels have not been read."""

    shape: tuple[int, ...]
    """Shape of the array, (i, j, k) or (i, j, k, modality)."""
    dtype: np.dtype
    """Type of the array's numbers."""
    affine: NDArray[np.float64]
    """Affine (4, 4) from voxel index to millimetres in RAS+."""
    fill: Callable[[NDArray], None]
    """Function that reads the voxels into an array of this shape and type. It raises FlapsamError if that fails."""

    @property
    def size(self) -> int:
        """Size of the voxels in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def geometry(self) -> Geometry:
        """Shape without modalities, and affine."""
        i, j, k = self.shape[:3]
        return (i, j, k), self.affine
