"""Random augmentation of training windows, on their own device. All slices of a window change alike.

Images have shape (windows, depth, channels, height, width) and values in [0, 1]. Labels have shape (windows, depth, height,
width). The changes that ``paper`` consists of take a single window, without the first dimension.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[Tensor, Tensor]
Change = Callable[[Tensor, Tensor, np.random.Generator], Window]


def paper(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Apply the paper's augmentation (arXiv 2407.21739, published code), which suits long training on few cases.

    Four changes are applied in this order, with probability ½ each. Two of the ten changes in ``EITHER`` always follow.
    Spatial changes use nearest-neighbour interpolation. Pixels from outside the slice become black background.
    """
    changed = [_as_in_the_paper(*window, rng) for window in zip(images, labels, strict=True)]
    return tuple(torch.stack(part) for part in zip(*changed, strict=True))  # pyright: ignore[reportReturnType]


def _as_in_the_paper(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    for change in (turn_and_flip, rotate, exponent, erase):
        if rng.random() < 0.5:
            images, labels = change(images, labels, rng)
    for index in rng.choice(len(EITHER), size=2, replace=False):
        images, labels = EITHER[index](images, labels, rng)
    return images, labels


def gentle(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Apply small changes for short training, such as another patient or scanner would cause. Nothing is mirrored.

    With probability 0.7, an affine map is applied about the centre, as if the slice were square. It rotates by up to ±12°,
    scales each axis by 0.85–1.18, shears by up to ±0.1 and shifts by up to 8 % of the side. Images are interpolated
    linearly, labels take the nearest pixel, and pixels from outside the slice repeat its border. With probability ½,
    intensities change by γ in e^±0.4, contrast of 0.8–1.2 and brightness of ±0.1. With probability ½, Gaussian noise with a
    standard deviation of up to 0.06 is added.
    """
    drawn = torch.tensor([_gentle_draw(rng) for _ in images], dtype=torch.float32)
    moved, toned, noisy = (bool((drawn[:, part] != drawn.new_tensor(UNCHANGED[part])).any()) for part in PARTS)
    numbers = drawn.to(images.device).T.reshape(len(UNCHANGED), -1, *[1] * (images.ndim - 1))
    if moved:
        images, labels = _affine(images, labels, numbers[PARTS[0]].reshape(2, 3, -1, 1, 1))
    if toned:
        gamma, factor, shift = numbers[PARTS[1]]
        images = images**gamma
        images = (_blend(images.mean(dim=(1, 2, 3, 4), keepdim=True), images, factor) + shift).clamp(0, 1)
    if noisy:
        (deviation,) = numbers[PARTS[2]]
        images = (images + deviation * torch.randn(images.shape, **_drawing(images, rng))).clamp(0, 1)
    return images, labels


UNCHANGED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
"""The numbers with which ``gentle`` leaves a window as it is: an affine map, exponent, contrast, brightness and noise."""
PARTS = (slice(0, 6), slice(6, 9), slice(9, 10))
"""Which of the numbers move a window, change its intensities and add noise."""


def _gentle_draw(rng: np.random.Generator) -> list[float]:
    """Draw the numbers of a window. The map takes output to input coordinates from −1 to 1, as in ``affine_grid``."""
    drawn = list(UNCHANGED)
    if rng.random() < 0.7:
        angle = math.radians(rng.uniform(-12, 12))
        cosine, sine = math.cos(angle), math.sin(angle)
        (wide, high), shear, shift = rng.uniform(0.85, 1.18, 2), rng.uniform(-0.1, 0.1), rng.uniform(-0.16, 0.16, 2)
        drawn[PARTS[0]] = [cosine * wide, (shear - sine) * wide, shift[0], sine * high, cosine * high, shift[1]]
    if rng.random() < 0.5:
        drawn[PARTS[1]] = [math.exp(rng.uniform(-0.4, 0.4)), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)]
    if rng.random() < 0.5:
        drawn[PARTS[2]] = [rng.uniform(0, 0.06)]
    return drawn


def turn_and_flip(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Rotate by a random multiple of 90° and flip along a random axis."""
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    images = torch.rot90(images, turns, (-2, -1)).flip(axis - 2)
    labels = torch.rot90(labels, turns, (-2, -1)).flip(axis - 2)
    return images, labels


def rotate(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Rotate by up to ±15° about the centre."""
    angle = math.radians(rng.uniform(-15, 15))
    height, width = labels.shape[-2:]
    x, y = (width - 1) / 2, (height - 1) / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = [[cosine, -sine, x - cosine * x + sine * y], [sine, cosine, y - sine * x - cosine * y]]
    return warp(images, labels, matrix)


def exponent(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Raise intensities to the power 1/γ, with γ in 0.5–3.5."""
    return images ** (1 / rng.uniform(0.5, 3.5)), labels


def erase(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Fill a rectangle with uniform noise in [0, 1] and set its labels to 0.

    It covers 2–5 % of the slice, with an aspect ratio of 0.3–3.3.
    """
    height, width = labels.shape[-2:]
    area, aspect = rng.uniform(0.02, 0.05) * height * width, rng.uniform(0.3, 3.3)
    tall = min(max(round(math.sqrt(area * aspect)), 1), height)
    wide = min(max(round(math.sqrt(area / aspect)), 1), width)
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    noise = torch.rand((*images.shape[:-2], tall, wide), **_drawing(images, rng))
    images, labels = images.clone(), labels.clone()
    images[..., top : top + tall, left : left + wide] = noise
    labels[..., top : top + tall, left : left + wide] = 0
    return images, labels


def shear_x(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shear along x by a factor of up to ±0.3."""
    return warp(images, labels, [[1, rng.uniform(-0.3, 0.3), 0], [0, 1, 0]])


def shear_y(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shear along y by a factor of up to ±0.3."""
    return warp(images, labels, [[1, 0, 0], [rng.uniform(-0.3, 0.3), 1, 0]])


def scale(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Scale from the top left corner. Input coordinates are 0.8–1.2 times the output's."""
    factor = rng.uniform(0.8, 1.2)
    return warp(images, labels, [[factor, 0, 0], [0, factor, 0]])


def translate_x(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shift along x by up to a fifth of the width."""
    return warp(images, labels, [[1, 0, rng.uniform(-0.2, 0.2) * labels.shape[-1]], [0, 1, 0]])


def translate_y(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shift along y by up to a fifth of the height."""
    return warp(images, labels, [[1, 0, 0], [0, 1, rng.uniform(-0.2, 0.2) * labels.shape[-2]]])


def posterize(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Keep the 4–8 most significant of eight bits."""
    step = 2 ** (8 - int(rng.integers(4, 9)))
    return (images * 255).floor().div(step).floor() * step / 255, labels


def contrast(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Blend with the mean intensity by a factor of 0.7–1.3."""
    return _blend(images.mean(), images, rng.uniform(0.7, 1.3)), labels


def brightness(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Blend with black by a factor of 0.7–1.3."""
    return _blend(images.new_zeros(()), images, rng.uniform(0.7, 1.3)), labels


def sharpness(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Blend with a smoothed copy by a factor of 0.1–1.9."""
    kernel = images.new_tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    flat = images.reshape(-1, 1, *images.shape[-2:])
    smooth = F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), kernel[None, None]).reshape(images.shape)
    return _blend(smooth, images, rng.uniform(0.1, 1.9)), labels


def nothing(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Return the window unchanged."""
    return images, labels


EITHER: tuple[Change, ...] = (
    shear_x,
    shear_y,
    scale,
    translate_x,
    translate_y,
    posterize,
    contrast,
    brightness,
    sharpness,
    nothing,
)
"""Changes of which ``paper`` applies two."""

AUGMENTATIONS: dict[str, Change] = {"paper": paper, "gentle": gentle, "none": nothing}
"""Augmentations of training windows by name."""

ON_SMALLER = ("gentle",)
"""Augmentations that depend on no pixel's size, so that a slice larger than the network's input is resized first."""

ONE_BY_ONE = ("paper",)
"""Augmentations that change the shape of some windows, so that they take one window at a time."""


def _drawing(images: Tensor, rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of a random tensor on the images' device. Its numbers follow from ``rng`` and the kind of device."""
    generator = torch.Generator(images.device)
    return {"generator": generator.manual_seed(int(rng.integers(2**63))), "device": images.device}


def _affine(images: Tensor, labels: Tensor, maps: Tensor) -> Window:
    """Move windows by maps (2, 3, windows, 1, 1)."""
    # The same as affine_grid, which takes a product of matrices for it.
    y, x = ((2 * torch.arange(side, device=images.device) + 1) / side - 1 for side in labels.shape[-2:])
    grid = torch.stack([a * x + b * y[:, None] + c for a, b, c in maps], dim=-1)

    def moved(planes: Tensor, mode: str) -> Tensor:
        return F.grid_sample(planes, grid, mode=mode, padding_mode="border", align_corners=False)

    moved_images = moved(images.flatten(1, 2), "bilinear").view_as(images)
    return moved_images.clamp(0, 1), moved(labels.float(), "nearest").long()


def warp(images: Tensor, labels: Tensor, matrix: list[list[float]]) -> Window:
    """Take each output pixel (x, y) from the input pixel nearest to ``matrix`` · (x, y, 1), or 0 outside the slice."""
    height, width = labels.shape[-2:]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    (a, b, c), (d, e, f) = matrix
    source_x = torch.round(a * x + b * y + c).long()
    source_y = torch.round(d * x + e * y + f).long()
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = (source_y.clamp(0, height - 1), source_x.clamp(0, width - 1))
    return images[..., index[0], index[1]] * inside, labels[..., index[0], index[1]] * inside


def _blend(towards: Tensor, images: Tensor, factor: float | Tensor) -> Tensor:
    return (towards + factor * (images - towards)).clamp(0, 1)
