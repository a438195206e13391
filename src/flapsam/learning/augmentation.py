"""Random changes of a training window, all its slices alike.

Images have shape (depth, channels, height, width) in [0, 1], labels (depth, height, width).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[Tensor, Tensor]
Change = Callable[[Tensor, Tensor, np.random.Generator], Window]


def paper(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """The paper's (arXiv 2407.21739, published code), for long training on few cases.

    Four changes with probability ½ each, in this order, then always two of the ten in ``EITHER``. Spatial changes take the
    nearest pixel; what comes from outside is black background.
    """
    for change in (turn_and_flip, rotate, exponent, erase):
        if rng.random() < 0.5:
            images, labels = change(images, labels, rng)
    for index in rng.choice(len(EITHER), size=2, replace=False):
        images, labels = EITHER[index](images, labels, rng)
    return images, labels


def gentle(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Small changes for short training: what another patient on another scanner might look like; nothing is mirrored.

    With probability 0.7 an affine map about the centre, as if the slice were square: ±12°, each axis by 0.85–1.18, shear
    ±0.1, shift by 8 % of the side; images by linear interpolation, what comes from outside repeats the rim. With probability
    ½ γ in e^±0.4, contrast 0.8–1.2 and brightness ±0.1. With probability ½ normal noise of a deviation up to 0.06.
    """
    if rng.random() < 0.7:
        images, labels = _affine(images, labels, rng)
    if rng.random() < 0.5:
        images = images ** math.exp(rng.uniform(-0.4, 0.4))
        images = _blend(images.mean(), images, rng.uniform(0.8, 1.2))
        images = (images + rng.uniform(-0.1, 0.1)).clamp(0, 1)
    if rng.random() < 0.5:
        noise = rng.uniform(0, 0.06) * rng.standard_normal(tuple(images.shape), dtype=np.float32)
        images = (images + torch.from_numpy(noise)).clamp(0, 1)
    return images, labels


def turn_and_flip(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Rotate by k·90° and flip along a random axis."""
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    images = torch.rot90(images, turns, (-2, -1)).flip(axis - 2)
    labels = torch.rot90(labels, turns, (-2, -1)).flip(axis - 2)
    return images, labels


def rotate(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Rotate within ±15° about the centre."""
    angle = math.radians(rng.uniform(-15, 15))
    height, width = labels.shape[-2:]
    x, y = (width - 1) / 2, (height - 1) / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = [[cosine, -sine, x - cosine * x + sine * y], [sine, cosine, y - sine * x - cosine * y]]
    return warp(images, labels, matrix)


def exponent(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Raise intensities to 1/γ, γ in 0.5–3.5."""
    return images ** (1 / rng.uniform(0.5, 3.5)), labels


def erase(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Fill a rectangle of 2–5 % of the area, aspect 0.3–3.3, with noise in [0, 1], label 0."""
    height, width = labels.shape[-2:]
    area, aspect = rng.uniform(0.02, 0.05) * height * width, rng.uniform(0.3, 3.3)
    tall = min(max(round(math.sqrt(area * aspect)), 1), height)
    wide = min(max(round(math.sqrt(area / aspect)), 1), width)
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    noise = rng.random((*images.shape[:-2], tall, wide), dtype=np.float32)
    images, labels = images.clone(), labels.clone()
    images[..., top : top + tall, left : left + wide] = torch.from_numpy(noise)
    labels[..., top : top + tall, left : left + wide] = 0
    return images, labels


def shear_x(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shear along x by a factor within ±0.3."""
    return warp(images, labels, [[1, rng.uniform(-0.3, 0.3), 0], [0, 1, 0]])


def shear_y(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shear along y by a factor within ±0.3."""
    return warp(images, labels, [[1, 0, 0], [rng.uniform(-0.3, 0.3), 1, 0]])


def scale(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Scale by 0.8–1.2 from the corner."""
    factor = rng.uniform(0.8, 1.2)
    return warp(images, labels, [[factor, 0, 0], [0, factor, 0]])


def translate_x(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shift along x by at most a fifth of the width."""
    return warp(images, labels, [[1, 0, rng.uniform(-0.2, 0.2) * labels.shape[-1]], [0, 1, 0]])


def translate_y(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Shift along y by at most a fifth of the height."""
    return warp(images, labels, [[1, 0, 0], [0, 1, rng.uniform(-0.2, 0.2) * labels.shape[-2]]])


def posterize(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Keep the highest 4–8 of eight bits."""
    step = 2 ** (8 - int(rng.integers(4, 9)))
    return (images * 255).floor().div(step).floor() * step / 255, labels


def contrast(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Blend with the mean grey by a factor of 0.7–1.3."""
    return _blend(images.mean(), images, rng.uniform(0.7, 1.3)), labels


def brightness(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Blend with black by a factor of 0.7–1.3."""
    return _blend(torch.zeros(()), images, rng.uniform(0.7, 1.3)), labels


def sharpness(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Blend with a smoothed copy by a factor of 0.1–1.9."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    flat = images.reshape(-1, 1, *images.shape[-2:])
    smooth = F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), kernel[None, None]).reshape(images.shape)
    return _blend(smooth, images, rng.uniform(0.1, 1.9)), labels


def nothing(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    """Leave the window as it is."""
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


AUGMENTATIONS: dict[str, Change] = {"paper": paper, "gentle": gentle, "none": nothing}
"""Name → what is done to a training window."""


def _affine(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Window:
    angle = math.radians(rng.uniform(-12, 12))
    cosine, sine = math.cos(angle), math.sin(angle)
    (wide, high), shear, shift = rng.uniform(0.85, 1.18, 2), rng.uniform(-0.1, 0.1), rng.uniform(-0.16, 0.16, 2)
    matrix = [[cosine * wide, (shear - sine) * wide, shift[0]], [sine * high, cosine * high, shift[1]]]
    grid = F.affine_grid(torch.tensor([matrix], dtype=torch.float32), [1, 1, *labels.shape[-2:]], align_corners=False)

    def moved(planes: Tensor, mode: str) -> Tensor:
        return F.grid_sample(planes[None], grid, mode=mode, padding_mode="border", align_corners=False)[0]

    moved_images = moved(images.flatten(0, 1), "bilinear").view_as(images)
    return moved_images.clamp(0, 1), moved(labels.float(), "nearest").long()


def warp(images: Tensor, labels: Tensor, matrix: list[list[float]]) -> Window:
    """Take each output pixel (x, y) from the nearest input pixel at ``matrix`` · (x, y, 1); outside is 0."""
    height, width = labels.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    (a, b, c), (d, e, f) = matrix
    source_x = torch.round(a * x + b * y + c).long()
    source_y = torch.round(d * x + e * y + f).long()
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = (source_y.clamp(0, height - 1), source_x.clamp(0, width - 1))
    return images[..., index[0], index[1]] * inside, labels[..., index[0], index[1]] * inside


def _blend(towards: Tensor, images: Tensor, factor: float) -> Tensor:
    return (towards + factor * (images - towards)).clamp(0, 1)
