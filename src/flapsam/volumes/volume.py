"""A volume: an array of voxels and their position in the patient."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError

CANONICAL_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Orientation of slices → axis of a canonical volume. Axis 0 points to the right, 1 to the front, 2 to the head (RAS+)."""


Geometry = tuple[tuple[int, int, int], NDArray[np.float64]]
"""Shape and affine."""


@dataclass(frozen=True)
class Volume:
    """Voxels (i, j, k) or (i, j, k, modality), and the affine (4, 4) from voxel index to millimetres in RAS+ world space."""

    array: NDArray
    affine: NDArray[np.float64]

    @property
    def geometry(self) -> Geometry:
        """Shape without modalities, and affine."""
        i, j, k = self.array.shape[:3]
        return (i, j, k), self.affine

    @property
    def modalities(self) -> int:
        """Number of modalities, such as T1 and T2, that the volume holds on the same grid."""
        return self.array.shape[3] if self.array.ndim == 4 else 1

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each axis, in mm."""
        return spacing_of(self.affine)

    def to_canonical(self) -> "Volume":
        """A view of the same voxels, with axes permuted and flipped to be nearest to RAS+. Nothing is interpolated."""
        orientation = orientations.io_orientation(self.affine)
        array = orientations.apply_orientation(self.array, orientation)
        affine = self.affine @ orientations.inv_ornt_aff(orientation, self.array.shape[:3])
        return Volume(array, affine)

    def ordered_as(self, grid: Geometry) -> "Volume":
        """A view of the same voxels in the order of a grid on which they lie. Nothing is interpolated.

        Raises:
            ValueError: they do not lie on this grid.
        """
        order = order_of(self.geometry, grid)
        if order is None:
            raise ValueError("the voxels do not lie on this grid")
        return Volume(orientations.apply_orientation(self.array, order), grid[1])


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel spacing in mm: the lengths of the affine's first three columns."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def check_affine(affine: Any, where: object) -> NDArray[np.float64]:
    """Return the affine if it maps every voxel to a different position.

    Args:
        affine: the affine (4, 4), or None.
        where: name of the image for the error message.

    Raises:
        FlapsamError: the affine is missing, singular or not finite.
    """
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise FlapsamError(f"{where}: the affine is singular, so voxels have no position in space; repair the header")
    return affine


def check_finite(array: NDArray, where: Path | str) -> None:
    """Check that every voxel is a finite number.

    Raises:
        FlapsamError: a voxel is NaN or infinite.
    """
    # Slices are checked one at a time, because a mask of the whole volume would need a lot of memory.
    check_whole(sum(count_broken(part) for part in np.moveaxis(array, 2, 0)), where)


def count_broken(array: NDArray) -> int:
    """Number of voxels that are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array))) if array.dtype.kind == "f" else 0


def check_whole(broken: int, where: object) -> None:
    """Raise FlapsamError if any voxels of an image are NaN or infinite.

    Args:
        broken: number of these voxels.
        where: name of the image for the error message.
    """
    if broken:
        raise FlapsamError(f"{where}: {broken} voxels are NaN or infinite; replace them or leave the case out")


def canonical_slice_axis(affine: NDArray[np.float64], axis: str) -> int:
    """The canonical axis that slices are perpendicular to.

    Args:
        affine: affine of the volume, in any orientation.
        axis: ``sagittal``, ``coronal`` or ``axial``. ``auto`` takes the axis with the largest spacing, and the last
            canonical axis among spacings that agree within 1 %.
    """
    if axis != "auto":
        return CANONICAL_AXES[axis]
    orientation = orientations.io_orientation(affine)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = spacing_of(affine)
    return int(np.flatnonzero(spacing >= 0.99 * spacing.max())[-1])


def slice_count(shape: tuple[int, int, int], affine: NDArray[np.float64], axis: str) -> int:
    """Number of slices of a volume in any orientation along ``axis``, which is named as for ``canonical_slice_axis``."""
    orientation = orientations.io_orientation(affine)
    return shape[int(np.flatnonzero(orientation[:, 0] == canonical_slice_axis(affine, axis))[0])]


def order_of(own: Geometry, grid: Geometry) -> NDArray | None:
    """How the axes of a volume must be permuted and flipped to lie on a grid, as an orientation (3, 2) of nibabel.

    None if the volume does not lie on this grid in any order.
    """
    # Relative to the grid, so that oblique axes near 45° are not taken for each other.
    order = orientations.io_orientation(np.linalg.inv(grid[1]) @ own[1])
    if np.isnan(order).any():
        return None
    shape = tuple(int(own[0][axis]) for axis in np.argsort(order[:, 0]))
    affine = own[1] @ orientations.inv_ornt_aff(order, own[0])
    return order if shape == tuple(grid[0]) and same_geometry(grid[1], affine, grid[0]) else None


def same_geometry(first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    """Whether two affines map every corner of a volume to the same position, within a tenth of the smallest spacing."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones((1, corners.shape[1]))])
    distance = np.linalg.norm(((first - second) @ homogeneous)[:3], axis=0).max()
    return bool(distance <= 0.1 * min(spacing_of(first)))
