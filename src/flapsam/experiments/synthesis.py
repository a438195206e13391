"""Images made from nothing: random label maps with random intensities, for pretraining without any data.

Label maps come from smooth noise, with deformed shapes pasted on them; every region gets its own random intensity and
texture; then come bias, blur, lower resolution and noise. Such synthesis alone gives features that carry over to real CT
and MRI (SynthSeg: Billot et al., Medical Image Analysis 2023, arXiv 2107.09559; Dey et al., ICLR 2025, arXiv 2411.02372).
A scene is three adjacent slices of a volume, so that the network can learn from its neighbours too.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TASKS = ("objects", "small objects", "largest object", "centre", "brighter", "borders")
"""Masks that are asked for, without any prompt: all shapes pasted on the ground; shapes inside shapes; the shape that covers
most; the region at the middle; regions brighter than the median pixel; borders between regions."""

REGIONS = 24
"""Most regions of a scene: ground, shapes, shapes inside shapes."""


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes."""

    images: Tensor
    """(batch, 3, size, size) in [0, 1]: the slice below, the slice itself, the slice above."""
    masks: Tensor
    """(batch, tasks, size, size), 0 or 1, of the slice itself."""


def draw_scenes(batch: int, size: int, draw: torch.Generator) -> Scenes:
    """Make scenes that depend on ``draw`` alone.

    Args:
        batch: number of scenes.
        size: side in pixels.
        draw: the only source of chance.
    """
    regions, kinds = _label_maps(batch, size, draw)
    clean = _paint(regions, draw)
    images = _degrade(clean, draw)
    return Scenes(images, _masks(regions, kinds, clean))


def _uniform(draw: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=draw)


def _smooth_noise(draw: torch.Generator, channels: tuple[int, int], cells: int, size: int) -> Tensor:
    """Normal noise on a coarse grid, resized: (*channels, size, size)."""
    return F.interpolate(torch.randn(*channels, cells, cells, generator=draw), (size, size), mode="bicubic")


def _slices_of_noise(draw: torch.Generator, batch: int, channels: int, cells: int, size: int) -> Tensor:
    """Smooth noise that changes a little from slice to slice: (batch, 3, channels, size, size)."""
    middle, drift = (_smooth_noise(draw, (batch, channels), cells, size) for _ in range(2))
    # Slices of thick and of thin volumes: how far a neighbour has gone differs by scene.
    step = _uniform(draw, 0.0, 0.6, batch, 1, 1, 1)
    return torch.stack([middle - step * drift, middle, middle + step * drift], dim=1)


def _label_maps(batch: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Regions (batch, 3, size, size) and what they are, the same shape: 0 ground, 1 shape, 2 shape inside a shape."""
    ground = int(torch.randint(3, 9, (1,), generator=draw))
    cells = int(torch.randint(3, 8, (1,), generator=draw))
    regions = _slices_of_noise(draw, batch, ground, cells, size).argmax(dim=2)
    kinds = torch.zeros_like(regions)
    warp = _slices_of_noise(draw, batch, 2, int(torch.randint(4, 10, (1,), generator=draw)), size)
    warp = warp * _uniform(draw, 0.0, 0.12, batch, 1, 1, 1, 1)
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None] + warp[:, :, 0], axis[None, :] + warp[:, :, 1]
    number = ground
    for _ in range(int(torch.randint(2, 7, (1,), generator=draw))):
        centre, radii, inside = _ellipse(batch, x, y, draw)
        there = (_uniform(draw, 0, 1, batch, 1, 1, 1) < 0.7) & inside
        regions, kinds = regions.where(~there, number), kinds.where(~there, 1)
        number += 1
        if number < REGIONS - 1:
            small = _within(batch, x, y, centre, radii, draw) & there
            small &= _uniform(draw, 0, 1, batch, 1, 1, 1) < 0.5
            regions, kinds = regions.where(~small, number), kinds.where(~small, 2)
            number += 1
    return regions, kinds


def _ellipse(batch: int, x: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (2, batch, 3, 1, 1), radii (2, batch, 1, 1, 1), and the inside (batch, 3, size, size)."""
    centre = _uniform(draw, -0.8, 0.8, 2, batch, 1, 1, 1) + _uniform(draw, -0.05, 0.05, 2, batch, 3, 1, 1)
    radii = 0.05 + 0.45 * _uniform(draw, 0, 1, 2, batch, 1, 1, 1) ** 1.5
    # A shape ends somewhere: its cross-section shrinks towards one side.
    shrink = 1 + _uniform(draw, -0.35, 0.35, batch, 1, 1, 1) * torch.tensor([-1.0, 0, 1]).view(1, 3, 1, 1)
    angle = _uniform(draw, 0, math.pi, batch, 1, 1, 1)
    dx, dy = x - centre[0], y - centre[1]
    along, across = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
    return centre, radii, (along / (radii[0] * shrink)) ** 2 + (across / (radii[1] * shrink)) ** 2 < 1


def _within(batch: int, x: Tensor, y: Tensor, centre: Tensor, radii: Tensor, draw: torch.Generator) -> Tensor:
    """The inside of a smaller disc in or on the rim of an ellipse: (batch, 3, size, size)."""
    angle, far = _uniform(draw, 0, 2 * math.pi, batch, 1, 1, 1), _uniform(draw, 0, 0.9, batch, 1, 1, 1)
    radius = radii.amin(dim=0) * _uniform(draw, 0.25, 0.6, batch, 1, 1, 1)
    cx = centre[0] + radii.amin(dim=0) * far * angle.cos()
    cy = centre[1] + radii.amin(dim=0) * far * angle.sin()
    return (x - cx) ** 2 + (y - cy) ** 2 < radius**2


def _paint(regions: Tensor, draw: torch.Generator) -> Tensor:
    """An intensity and a texture for every region: (batch, 3, size, size)."""
    batch, size = len(regions), regions.shape[-1]
    flat = regions.flatten(1)
    level = _uniform(draw, 0, 1, batch, REGIONS).gather(1, flat).view_as(regions)
    rough = (0.12 * _uniform(draw, 0, 1, batch, REGIONS) ** 2).gather(1, flat).view_as(regions)
    coarse = (0.10 * _uniform(draw, 0, 1, batch, REGIONS) ** 2).gather(1, flat).view_as(regions)
    fine = torch.randn(batch, 3, size, size, generator=draw)
    cells = int(torch.randint(10, 40, (1,), generator=draw))
    return level + rough * fine + coarse * _slices_of_noise(draw, batch, 1, cells, size)[:, :, 0]


def _degrade(images: Tensor, draw: torch.Generator) -> Tensor:
    """What a scanner does: bias, blur, resolution, noise, contrast; scaled to [0, 1]."""
    batch, size = len(images), images.shape[-1]
    bias = _smooth_noise(draw, (batch, 1), 3, size) * _uniform(draw, 0, 0.3, batch, 1, 1, 1)
    images = images * bias.exp()
    images = _blur(images, float(_uniform(draw, 0.0, 1.6, 1)))
    if float(_uniform(draw, 0, 1, 1)) < 0.6:
        coarse = int(size * float(_uniform(draw, 0.3, 1.0, 1)))
        images = F.interpolate(F.interpolate(images, coarse, mode="area"), (size, size), mode="bicubic")
    noise = torch.randn(images.shape, generator=draw) * (0.12 * _uniform(draw, 0, 1, batch, 1, 1, 1) ** 2)
    images = images + noise
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low + 1e-8)) ** torch.exp(_uniform(draw, -0.7, 0.7, batch, 1, 1, 1))
    invert = _uniform(draw, 0, 1, batch, 1, 1, 1) < 0.3
    images = images.where(~invert, 1 - images)
    alone = _uniform(draw, 0, 1, batch, 1, 1, 1) < 0.3
    return images.where(~alone, images[:, 1:2])


def _blur(images: Tensor, deviation: float) -> Tensor:
    if deviation < 0.3:
        return images
    reach = math.ceil(2 * deviation)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    images = F.conv2d(images, kernel, padding=(0, reach), groups=3)
    return F.conv2d(images, kernel.transpose(2, 3), padding=(reach, 0), groups=3)


def _masks(regions: Tensor, kinds: Tensor, clean: Tensor) -> Tensor:
    """The tasks' masks of the middle slice: (batch, tasks, size, size)."""
    middle, kind = regions[:, 1], kinds[:, 1]
    size = middle.shape[-1]
    flat = middle.flatten(1)
    empty = torch.zeros(len(middle), REGIONS)
    centre = middle[:, size // 2, size // 2]
    bright = (
        empty.scatter_reduce(1, flat, clean[:, 1].flatten(1), "mean", include_self=False).gather(1, flat).view_as(middle)
    )
    largest = empty.scatter_add(1, flat, (kind > 0).flatten(1).float()).argmax(dim=1)[:, None, None]
    median = clean[:, 1].flatten(1).median(dim=1).values[:, None, None]
    padded = F.pad(middle[:, None].float(), (1, 1, 1, 1), mode="replicate")
    border = F.max_pool2d(padded, 3, 1) != -F.max_pool2d(-padded, 3, 1)
    masks = {
        "objects": kind > 0,
        "small objects": kind == 2,
        "largest object": (middle == largest) & (kind > 0),
        "centre": middle == centre[:, None, None],
        "brighter": bright > median,
        "borders": border[:, 0],
    }
    return torch.stack([masks[task] for task in TASKS], dim=1).float()
