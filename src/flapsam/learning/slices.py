"""Cut a volume into 2-D samples with values in [0, 1].

A sample is a window of adjacent slices. The network segments every slice of a window by itself. The slices share only their
scaling and augmentation. Training and inference cut and scale slices with the same code.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flapsam.run.config import Samples
from flapsam.sites import IGNORED
from flapsam.volumes import Volume, canonical_slice_axis

REACH = 2
"""Number of neighbours on either side that take part in scaling. The paper's windows have five slices."""


Bounds = tuple[tuple[float, float], ...]
"""Lowest and highest intensity, one pair for each modality."""


@dataclass(frozen=True)
class SliceStack:
    """A volume's slices in canonical axes.

    ``images`` has shape (slices, height, width), or (slices, height, width, modalities) if there are several modalities.
    """

    images: NDArray
    samples: Samples
    bounds: Bounds
    """Intensity range of the volume as stored."""
    clip: Bounds | None = None
    """Range that intensities are clipped to, if any."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, height and width."""
        return self.images.shape[:3]  # pyright: ignore[reportReturnType]

    def window(self, centre: int, depth: int = 1) -> Tensor:
        """``depth`` adjacent slices around ``centre``. Beyond the volume, its outermost slice is repeated.

        Intensities are scaled by (x − min) / (max − min + 1e-8), for each modality separately. Minimum and maximum are taken
        over the centre and its two neighbours on either side, or over the volume.

        Returns:
            Images (depth, channels, height, width) in [0, 1]. There is one channel for a single modality with
            ``replicate``, otherwise there are three.
        """
        half = depth // 2
        multimodal = self.images.ndim == 4
        adjacent = self.samples.channels == "adjacent" and not multimodal
        slices = self._take(centre, max(half + adjacent, REACH))
        middle = len(slices) // 2
        if self.samples.scaling == "volume":
            bounds = self.bounds if self.clip is None else _cut(self.bounds, self.clip)
        else:
            bounds = _bounds(slices[middle - REACH : middle + REACH + 1])
        low, high = (torch.tensor(side) for side in zip(*bounds, strict=True)) if multimodal else bounds[0]
        scaled = (torch.from_numpy(slices) - low) / (high - low + 1e-8)
        first, last = middle - half, middle + half + 1
        if multimodal:
            images = scaled[first:last].movedim(-1, 1)
            # Neighbours in the window may lie outside the slices that set the scale.
            return (images if images.shape[1] == 3 else images[:, [0, 1, 1]]).clamp(0, 1)
        if not adjacent:
            return scaled[first:last, None]
        channels = [scaled[first + shift : last + shift] for shift in (-1, 0, 1)]
        # The outermost neighbours may lie outside the slices that set the scale.
        return torch.stack(channels, dim=1).clamp(0, 1)

    def _take(self, centre: int, reach: int) -> NDArray[np.float32]:
        indices = np.clip(np.arange(centre - reach, centre + reach + 1), 0, len(self) - 1)
        slices = np.asarray(self.images[indices], dtype=np.float32)
        if self.clip is None:
            return slices
        low, high = np.array(self.clip, np.float32).T if self.images.ndim == 4 else self.clip[0]
        return slices.clip(low, high)


def stack_of(volume: Volume, samples: Samples, site: str = "") -> SliceStack:
    """Turn a volume in any orientation into a stack of slices.

    Args:
        volume: the image or label map.
        samples: how it is cut and scaled.
        site: the volume's site, which matters where sites clip intensities differently.
    """
    axis = canonical_slice_axis(volume.affine, samples.axis)
    images = np.moveaxis(volume.to_canonical().array, axis, 0)
    return SliceStack(images, samples, _bounds(images), clip_bounds(samples, site, ceiling(images, samples)))


def to_square(images: Tensor, size: int, resize: str) -> Tensor:
    """Resize images (n, channels, height, width) to (n, channels, size, size).

    Interpolation is bicubic, and the result is clipped to [0, 1]. Padding is 0.
    """
    height, width = _inner_size(images.shape[-2:], size, resize)
    if (height, width) != images.shape[-2:]:
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return F.pad(images, (0, size - width, 0, size - height))


def labels_to_square(labels: Tensor, size: int, resize: str) -> Tensor:
    """Resize class indices (n, height, width) to (n, size, size) by nearest neighbour. Padding is marked as ignored."""
    height, width = _inner_size(labels.shape[-2:], size, resize)
    if (height, width) != labels.shape[-2:]:
        labels = F.interpolate(labels[:, None].float(), (height, width), mode="nearest-exact")[:, 0].long()
    return F.pad(labels, (0, size - width, 0, size - height), value=IGNORED)


def from_square(probabilities: Tensor, shape: tuple[int, int], resize: str) -> Tensor:
    """Resize probabilities (n, classes, size, size) back to slices of ``shape``: (n, classes, height, width)."""
    height, width = _inner_size(shape, probabilities.shape[-1], resize)
    inner = probabilities[..., :height, :width]
    if inner.shape[-2:] == shape:
        return inner
    return F.interpolate(inner, shape, mode="bilinear", antialias=True)


def _bounds(images: NDArray) -> Bounds:
    return tuple((float(part.min()), float(part.max())) for part in _by_modality(images))


def _by_modality(images: NDArray) -> list[NDArray]:
    return [images] if images.ndim == 3 else [images[..., index] for index in range(images.shape[3])]


def ceiling(images: NDArray, samples: Samples) -> tuple[float, ...] | None:
    """Intensity of each modality at the percentile that intensities are clipped to. None without a percentile."""
    if samples.clip_percentile is None:
        return None
    return tuple(float(np.percentile(part, samples.clip_percentile)) for part in _by_modality(images))


def clip_bounds(samples: Samples, site: str, ceiling: tuple[float, ...] | None) -> Bounds | None:
    """Range that a case's intensities are clipped to: the site's or else the run's, below the volume's percentile.

    Args:
        samples: how volumes become samples.
        site: the case's site.
        ceiling: intensity of each modality at the percentile, if there is one.
    """
    configured = samples.site_clip.get(site, samples.clip)
    if ceiling is None:
        return None if configured is None else (configured,) * samples.modalities
    low, high = configured or (-math.inf, math.inf)
    return tuple((low, min(high, value)) for value in ceiling)


def _cut(bounds: Bounds, clip: Bounds) -> Bounds:
    return tuple(
        (min(max(low, floor), top), min(max(high, floor), top))
        for (low, high), (floor, top) in zip(bounds, clip, strict=True)
    )


def _inner_size(shape: tuple[int, ...], size: int, resize: str) -> tuple[int, int]:
    """Height and width of a slice inside the square."""
    if resize == "stretch":
        return size, size
    height, width = shape
    longer = max(height, width)
    return max(round(height * size / longer), 1), max(round(width * size / longer), 1)
