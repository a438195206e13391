"""A volume: an array of voxels and where they stand in the patient."""

from dataclasses import dataclass

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

CANONICAL_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Axes of a canonical volume: 0 grows to the right, 1 to the front, 2 to the head (RAS+)."""


Geometry = tuple[tuple[int, int, int], NDArray[np.float64]]
"""Shape and affine."""


@dataclass(frozen=True)
class Volume:
    """Voxels (i, j, k) or (i, j, k, modality), and the affine (4, 4) from voxel index to millimetres in RAS+ world space."""

    array: NDArray
    affine: NDArray[np.float64]

    @property
    def geometry(self) -> Geometry:
        """Shape, without modalities, and affine."""
        i, j, k = self.array.shape[:3]
        return (i, j, k), self.affine

    @property
    def modalities(self) -> int:
        """Images of the same place in one volume, such as T1 and T2."""
        return self.array.shape[3] if self.array.ndim == 4 else 1

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along each axis, in mm."""
        return spacing_of(self.affine)

    def to_canonical(self) -> "Volume":
        """The same voxels with axes permuted and flipped to be nearest to RAS+; nothing is interpolated."""
        orientation = orientations.io_orientation(self.affine)
        array = orientations.apply_orientation(self.array, orientation)
        affine = self.affine @ orientations.inv_ornt_aff(orientation, self.array.shape[:3])
        return Volume(array, affine)


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Lengths in mm of the affine's three columns."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def from_canonical(array: NDArray, affine: NDArray[np.float64]) -> NDArray:
    """Bring ``array``, made in the canonical axes, back to the axes of the volume whose affine is ``affine``."""
    orientation = orientations.io_orientation(affine)
    back = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), orientation)
    return orientations.apply_orientation(array, back)


def canonical_slice_axis(affine: NDArray[np.float64], axis: str) -> int:
    """The canonical axis that slices are perpendicular to.

    Args:
        affine: of the volume in any orientation.
        axis: ``sagittal``, ``coronal`` or ``axial``; ``auto`` takes the largest spacing and, of spacings that agree
            within 1 %, the last canonical axis.
    """
    if axis != "auto":
        return CANONICAL_AXES[axis]
    orientation = orientations.io_orientation(affine)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = spacing_of(affine)
    return int(np.flatnonzero(spacing >= 0.99 * spacing.max())[-1])


def slice_count(shape: tuple[int, int, int], affine: NDArray[np.float64], axis: str) -> int:
    """Slices that a volume in any orientation has along ``axis``, as ``canonical_slice_axis`` names it."""
    orientation = orientations.io_orientation(affine)
    return shape[int(np.flatnonzero(orientation[:, 0] == canonical_slice_axis(affine, axis))[0])]


def same_geometry(first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    """Whether two affines put every corner of a volume at the same place, within a tenth of the smallest spacing."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones((1, corners.shape[1]))])
    distance = np.linalg.norm(((first - second) @ homogeneous)[:3], axis=0).max()
    return bool(distance <= 0.1 * min(spacing_of(first)))
