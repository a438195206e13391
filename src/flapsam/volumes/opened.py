"""An image between its header and its voxels."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.volumes.allocation import no_room
from flapsam.volumes.volume import Geometry, check_whole, count_broken


@dataclass(frozen=True)
class Opened:
    """An image whose header was checked, and whose voxels have not been read."""

    shape: tuple[int, ...]
    """Shape of the array, (i, j, k) or (i, j, k, modality)."""
    dtype: np.dtype
    """Type of the array's numbers."""
    affine: NDArray[np.float64]
    """Affine (4, 4) from voxel index to millimetres in RAS+."""
    parts: Callable[[], Iterator[NDArray]]
    """Function that reads the voxels, as parts of the array that follow each other along its last axis."""

    @property
    def size(self) -> int:
        """Size of the voxels in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def geometry(self) -> Geometry:
        """Shape without modalities, and affine."""
        i, j, k = self.shape[:3]
        return (i, j, k), self.affine

    def write(self, file: IO[bytes], name: object) -> None:
        """Read the voxels and write them to a file, in the memory order of the array's first axis.

        Args:
            file: the file.
            name: name of the image for the error message.

        Raises:
            FlapsamError: the voxels cannot be read, or some are NaN or infinite.
        """
        broken = 0
        for part in self.parts():
            # The transposed part is in the order of the file, so this rarely copies.
            voxels = np.ascontiguousarray(part.T, self.dtype)
            broken += count_broken(voxels)
            rest = voxels.data.cast("B")
            while rest:
                try:
                    rest = rest[file.write(rest) :]
                except OSError as error:
                    raise no_room(name, self.size) from error
        check_whole(broken, name)
        if file.tell() != self.size:
            raise FlapsamError(f"{name}: it holds more or fewer voxels than its header says; export it again")
