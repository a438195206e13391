"""Measures of agreement between two masks of the same structure, as Metrics Reloaded recommends (Maier-Hein et al. 2024).

Every function takes a predicted and a true mask of the same shape. All measures of distance are MONAI's.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import generate_binary_structure, label

Mask = NDArray[np.bool_]
LEAST_OVERLAP = 0.5
"""A lesion is found if a predicted one has more than this intersection over union with it, so that no two can claim it."""


@dataclass(frozen=True)
class Measure:
    """A measure that cases are scored by."""

    name: str
    """Name in JSON and in Python."""
    title: str
    """Name for people."""
    unit: str
    """Unit, empty for a share."""
    digits: int
    """Number of digits to show after the decimal point."""
    highest: float
    """Largest possible value."""
    more_is_better: bool
    text: str
    """What it is, and its value where a structure is in one of the two masks only."""

    @property
    def head(self) -> str:
        """Head of a table's column."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


_ALL = (
    Measure("dice", "Dice", "", 3, 1, True, "twice the common volume over the sum of both volumes; 0 where one is empty"),
    Measure(
        "surface_dice",
        "surface Dice",
        "",
        3,
        1,
        True,
        "share of both surfaces that lies within the tolerance of the other; 0 where one is empty",
    ),
    Measure(
        "hd95",
        "HD95",
        "mm",
        1,
        math.inf,
        False,
        "95th percentile of the distances from one surface to the other, the larger of the two directions; the image's "
        "diagonal where one is empty",
    ),
    Measure(
        "surface_distance",
        "ASSD",
        "mm",
        2,
        math.inf,
        False,
        "average symmetric surface distance, over all voxels of both surfaces; the image's diagonal where one is empty",
    ),
    Measure(
        "volume_error", "volume error", "", 3, 1, False, "difference of the volumes over their sum; 1 where one is empty"
    ),
    Measure(
        "lesion_f1",
        "lesion F1",
        "",
        3,
        1,
        True,
        "F1 of the lesions found, those with an intersection over union above 0.5; 0 where one is empty",
    ),
)
MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in _ALL}
"""Name → measure, in the order of tables."""


def dice(predicted: Mask, truth: Mask) -> float | None:
    """Dice coefficient 2·|P ∩ T| / (|P| + |T|). It is 0 if only one mask is empty, and None if both are."""
    both = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth))
    return None if both == 0 else 2 * int(np.count_nonzero(predicted & truth)) / both


def volume_error(predicted: Mask, truth: Mask) -> float | None:
    """Difference of the volumes over their sum, | |P| − |T| | / (|P| + |T|). It is 1 if only one mask is empty, and None if
    both are. One minus it is the volumetric similarity (Taha & Hanbury 2015).
    """
    volumes = int(np.count_nonzero(predicted)), int(np.count_nonzero(truth))
    return None if sum(volumes) == 0 else abs(volumes[0] - volumes[1]) / sum(volumes)


def surface_dice(predicted: Mask, truth: Mask, spacing: Sequence[float], tolerance: float) -> float | None:
    """Share of both surfaces' areas within a tolerance of the other surface (Nikolov et al. 2018, arXiv 1809.04430).

    It is 0 if only one mask is empty, and None if both are.

    Args:
        predicted: the predicted mask (x, y, z).
        truth: the true mask.
        spacing: voxel spacing in mm.
        tolerance: largest distance in mm that does not count as an error.
    """
    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() or truth.any() else None
    from monai.metrics.surface_dice import compute_surface_dice

    return _of_surfaces(
        compute_surface_dice, predicted, truth, spacing, class_thresholds=[float(tolerance)], use_subvoxels=True
    )


def hd95(predicted: Mask, truth: Mask, spacing: Sequence[float]) -> float | None:
    """95 % Hausdorff distance in mm, the larger of the two directions.

    It is the ``diagonal`` if only one mask is empty, and None if both are. The arguments are those of ``surface_dice``.
    """
    if not predicted.any() or not truth.any():
        return diagonal(truth.shape, spacing) if predicted.any() or truth.any() else None
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    return _of_surfaces(compute_hausdorff_distance, predicted, truth, spacing, percentile=95)


def surface_distance(predicted: Mask, truth: Mask, spacing: Sequence[float]) -> float | None:
    """Mean surface distance in mm: the mean over the voxels of both surfaces of the distance to the other surface.

    It is the ``diagonal`` if only one mask is empty, and None if both are. The arguments are those of ``surface_dice``.
    """
    if not predicted.any() or not truth.any():
        return diagonal(truth.shape, spacing) if predicted.any() or truth.any() else None
    from monai.metrics.surface_distance import compute_average_surface_distance

    return _of_surfaces(compute_average_surface_distance, predicted, truth, spacing, symmetric=True)


def lesion_f1(predicted: Mask, truth: Mask) -> float | None:
    """F1 of single lesions, 2·TP / (2·TP + FP + FN). It is 0 if only one mask is empty, and None if both are.

    A lesion is a group of voxels that touch, if only at a corner. It is found if its intersection over union with a
    predicted one is above 0.5, so that each matches at most one other (Kirillov et al. 2019, arXiv 1801.00868).
    """
    touching = generate_binary_structure(predicted.ndim, predicted.ndim)
    guesses, guessed = _labelled(predicted, touching)
    lesions, present = _labelled(truth, touching)
    if guessed + present == 0:
        return None
    both = predicted & truth
    pairs, common = np.unique(np.stack([guesses[both], lesions[both]]), axis=1, return_counts=True)
    sizes = np.bincount(guesses.ravel())[pairs[0]] + np.bincount(lesions.ravel())[pairs[1]] - common
    return 2 * int((common > LEAST_OVERLAP * sizes).sum()) / (guessed + present)


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Distance in mm between the centres of an image's opposite corners. No distance between two structures is larger."""
    return math.hypot(*((count - 1) * step for count, step in zip(shape, spacing, strict=True)))


def _labelled(mask: Mask, touching: NDArray) -> tuple[NDArray, int]:
    labelled, count = label(mask, touching)  # pyright: ignore[reportGeneralTypeIssues]
    return labelled, int(count)


def _of_surfaces(
    function: Callable[..., Any], predicted: Mask, truth: Mask, spacing: Sequence[float], **options: Any
) -> float:
    """A function of MONAI on the smallest box around both masks. Beyond the image's border there is background.

    An image of one slice is 2-D. In 3-D, all its voxels would belong to the surface.
    """
    # torch takes seconds to import, and most commands and a federation's processes do not need it.
    import torch

    deep = [axis for axis, count in enumerate(truth.shape) if count > 1]
    if len(deep) == 2:
        flat = tuple(axis for axis in range(truth.ndim) if axis not in deep)
        predicted, truth = predicted.squeeze(flat), truth.squeeze(flat)
        spacing = [spacing[axis] for axis in deep]
    box = _box(predicted | truth)
    pair = [torch.from_numpy(np.pad(mask[box], 1))[None, None].float() for mask in (predicted, truth)]
    with warnings.catch_warnings():
        # MONAI warns about an argument that it passes itself.
        warnings.simplefilter("ignore", FutureWarning)
        return float(function(*pair, include_background=True, spacing=[float(step) for step in spacing], **options))


def _box(mask: Mask) -> tuple[slice, ...]:
    """Slices of the smallest box that holds all true voxels."""
    box = []
    for axis in range(mask.ndim):
        line = np.flatnonzero(mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis)))
        box.append(slice(int(line[0]), int(line[-1]) + 1))
    return tuple(box)
