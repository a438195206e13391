"""Cut a volume into 2-D samples with values in [0, 1].

A sample is a window of adjacent slices. The network segments every slice of a window by itself. The slices share only their
scaling and augmentation. Training and inference cut and scale slices with the same code.
"""

import math
import sys
from collections.abc import Iterable, Sequence
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

CPU = torch.device("cpu")

CACHED = 2**16
"""Pixels of slices that a CPU cuts at once. With more, it is no faster than memory: half as fast for slices of 512²."""

SENT = tuple(np.dtype(name) for name in ("uint8", "int8", "int16", "float32"))
"""Stored types that a device gets as they are, because no copy of them would be smaller."""

Bounds = tuple[tuple[float, float], ...]
"""Lowest and highest intensity, one pair for each modality."""


@dataclass(frozen=True)
class SliceStack:
    """A volume's slices in canonical axes.

    ``images`` has shape (slices, height, width), or (slices, height, width, modalities) if there are several modalities.
    """

    images: NDArray
    samples: Samples
    ranges: Sequence[Bounds]
    """Intensity range of each slice as stored."""
    clip: Bounds | None = None
    """Range that intensities are clipped to, if any."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, height and width."""
        return self.images.shape[:3]  # pyright: ignore[reportReturnType]

    def window(self, centre: int, depth: int = 1, device: torch.device = CPU) -> Tensor:
        """One window (depth, channels, height, width), as ``windows`` returns it."""
        return windows([(self, centre)], depth, device)[0]

    def scale(self, centre: int) -> Bounds:
        """The intensities that become 0 and 1 in the window around ``centre``, for each modality."""
        bounds = overall(self.ranges if self.samples.scaling == "volume" else [self.ranges[i] for i in self.near(centre)])
        return bounds if self.clip is None else _cut(bounds, self.clip)

    def near(self, centre: int, reach: int = REACH) -> NDArray[np.int64]:
        """Indices of the slices around ``centre``. Beyond the volume, its outermost slice is repeated."""
        return np.clip(np.arange(centre - reach, centre + reach + 1), 0, len(self) - 1)


def windows(places: Sequence[tuple[SliceStack, int]], depth: int = 1, device: torch.device = CPU) -> Tensor:
    """Cut windows of ``depth`` adjacent slices, all of the same height and width.

    Intensities are scaled by (x − min) / (max − min + 1e-8), for each modality separately. Minimum and maximum are taken
    over the centre and its two neighbours on either side, or over the volume. Beyond the volume, its outermost slice is
    repeated. Slices go to the device as they are stored and are scaled there.

    Args:
        places: the stack and the middle slice of each window. All stacks are cut and scaled in the same way.
        depth: number of slices in a window.
        device: device of the result.

    Returns:
        Images (windows, depth, channels, height, width) in [0, 1]. There is one channel for a single modality with
        ``replicate``, otherwise there are three.
    """
    stack, _ = places[0]
    multimodal = stack.images.ndim == 4
    adjacent = stack.samples.channels == "adjacent" and not multimodal
    reach = depth // 2 + adjacent
    slices = _taken(places, reach, device)

    scales = np.array([stack.scale(centre) for stack, centre in places])
    clips = np.array([stack.clip or ((-math.inf, math.inf),) * len(stack.ranges[0]) for stack, _ in places])
    table = np.stack([scales[..., 0], scales[..., 1] - scales[..., 0] + 1e-8, clips[..., 0], clips[..., 1]])
    # One window's numbers meet all its slices, and one modality's numbers all its pixels.
    shape = (4, len(places), 1, 1, 1, -1) if multimodal else (4, len(places), 1, 1, 1)
    low, width, least, most = torch.from_numpy(table.astype(np.float32)).reshape(shape).to(device)
    if any(stack.clip for stack, _ in places):
        slices = slices.clamp(least, most)
    scaled = (slices - low) / width
    if multimodal:
        images = scaled.movedim(-1, 2)
        # Neighbours in the window may lie outside the slices that set the scale.
        return (images if images.shape[2] == 3 else images[:, :, [0, 1, 1]]).clamp(0, 1)
    if not adjacent:
        return scaled[:, :, None]
    channels = [scaled[:, shift : shift + depth] for shift in range(3)]
    # The outermost neighbours may lie outside the slices that set the scale.
    return torch.stack(channels, dim=2).clamp(0, 1)


def _taken(places: Sequence[tuple[SliceStack, int]], reach: int, device: torch.device) -> Tensor:
    """The slices of windows (windows, 2 · reach + 1, height, width, …) in float32."""
    near = np.stack([stack.near(centre, reach) for stack, centre in places])
    first, _ = places[0]
    if any(stack is not first for stack, _ in places):
        return _sent(np.stack([stack.images[own] for (stack, _), own in zip(places, near, strict=True)]), device)
    # Neighbouring windows share slices, and each is sent once.
    chosen, order = np.unique(near, return_inverse=True)
    return _sent(first.images[chosen], device)[torch.from_numpy(order.reshape(near.shape)).to(device)]


def _sent(stored: NDArray, device: torch.device) -> Tensor:
    stored = stored if stored.dtype in SENT else stored.astype(np.float32)
    return torch.from_numpy(stored).to(device).float()


def at_once(shape: Sequence[int], depth: int, device: torch.device) -> int:
    """Number of windows of slices (height, width) to cut at once: any number on a GPU, on a CPU what its cache holds."""
    return max(CACHED // (math.prod(shape) * depth), 1) if device.type == "cpu" else sys.maxsize


def stack_of(volume: Volume, samples: Samples, site: str = "") -> SliceStack:
    """Turn a volume in any orientation into a stack of slices.

    Args:
        volume: the image or label map.
        samples: how it is cut and scaled.
        site: the volume's site, which matters where sites clip intensities differently.
    """
    axis = canonical_slice_axis(volume.affine, samples.axis)
    images = np.moveaxis(volume.to_canonical().array, axis, 0)
    return SliceStack(images, samples, ranges_of(images), clip_bounds(samples, site, ceiling(images, samples)))


def to_square(images: Tensor, size: int, resize: str) -> Tensor:
    """Resize images (n, channels, height, width) to (n, channels, size, size).

    Interpolation is bicubic, and the result is clipped to [0, 1]. Padding is 0.
    """
    return padded(resized(images, inner_size(images.shape[-2:], size, resize)), size)


def resized(images: Tensor, inner: tuple[int, int]) -> Tensor:
    """Resize images (n, channels, height, width) bicubically to ``inner``, and clip the result to [0, 1]."""
    if inner == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, inner, mode="bicubic", antialias=True).clamp(0, 1)


def padded(planes: Tensor, size: int, value: int = 0) -> Tensor:
    """Fill up planes (…, height, width) to a square, to the right and below."""
    return F.pad(planes, (0, size - planes.shape[-1], 0, size - planes.shape[-2]), value=value)


def labels_to_square(labels: Tensor, size: int, resize: str) -> Tensor:
    """Resize class indices (n, height, width) to (n, size, size) by nearest neighbour. Padding is marked as ignored."""
    return padded(resized_labels(labels, inner_size(labels.shape[-2:], size, resize)), size, IGNORED)


def resized_labels(labels: Tensor, inner: tuple[int, int]) -> Tensor:
    """Resize class indices (n, height, width) to ``inner`` by nearest neighbour."""
    if inner == tuple(labels.shape[-2:]):
        return labels
    return F.interpolate(labels[:, None].float(), inner, mode="nearest-exact")[:, 0].long()


def from_square(probabilities: Tensor, shape: tuple[int, int], resize: str) -> Tensor:
    """Resize probabilities (n, classes, size, size) back to slices of ``shape``: (n, classes, height, width)."""
    height, width = inner_size(shape, probabilities.shape[-1], resize)
    inner = probabilities[..., :height, :width]
    if inner.shape[-2:] == shape:
        return inner
    return F.interpolate(inner, shape, mode="bilinear", antialias=True)


def ranges_of(images: NDArray) -> list[Bounds]:
    """Intensity range of each slice, one pair for each modality, rounded to float32."""
    lows, highs = (
        extreme(images, axis=(1, 2)).astype(np.float32).reshape(len(images), -1).tolist() for extreme in (np.min, np.max)
    )
    return [tuple(zip(low, high, strict=True)) for low, high in zip(lows, highs, strict=True)]


def overall(ranges: Iterable[Bounds]) -> Bounds:
    """Intensity range of several slices, for each modality."""
    return tuple((min(low for low, _ in pairs), max(high for _, high in pairs)) for pairs in zip(*ranges, strict=True))


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


def inner_size(shape: tuple[int, ...], size: int, resize: str) -> tuple[int, int]:
    """Height and width of a slice inside the square."""
    if resize == "stretch":
        return size, size
    height, width = shape
    longer = max(height, width)
    return max(round(height * size / longer), 1), max(round(width * size / longer), 1)
