"""Synthesis of random label maps with random intensities, for pretraining without any data.

Label maps come from smooth noise, with deformed shapes pasted on them. Every region gets its own random intensity and
texture. Then bias, blur, lower resolution and noise are added. Features learned from such images alone carry over to real CT
and MRI (SynthSeg: Billot et al., Medical Image Analysis 2023, arXiv 2107.09559; Dey et al., ICLR 2025, arXiv 2411.02372).
A scene is three adjacent slices of a volume, so that the network can also learn from a slice's neighbours.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

TASKS = (
    "objects",
    "small objects",
    "elongated objects",
    "objects at the right",
    "largest object",
    "brightest object",
    "centre",
    "brighter",
    "borders",
)
"""Masks that the network learns to predict without prompts. In order: all shapes pasted on the background; shapes inside
other shapes or on their rim; shapes more than 1.7 times as long as wide; the part of all shapes in the right half; the shape
with the largest area; the shape with the highest mean; the region at the image's centre; regions brighter than the median
pixel; borders between regions."""

REGIONS = 24
"""Largest number of regions in a scene: background, shapes, shapes inside shapes, and air."""
AIR = REGIONS - 1


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes."""

    images: Tensor
    """The slice below, the slice itself and the slice above, in [0, 1]: (batch, 3, size, size)."""
    masks: Tensor
    """The slice's mask for each task, 0 or 1: (batch, tasks, size, size)."""
    levels: Tensor
    """Mean intensity of each pixel's region in the slice, before bias, blur and noise: (batch, size, size)."""


@dataclass(frozen=True)
class _LabelMaps:
    regions: Tensor
    """Number of each pixel's region: (batch, 3, size, size)."""
    shapes: Tensor
    """Kind of each region: 0 background or air, 1 shape, 2 shape inside a shape: (REGIONS,)."""
    elongated: Tensor
    """Whether each region is an elongated shape: (batch, REGIONS)."""


def draw_scenes(batch: int, size: int, draw: torch.Generator) -> Scenes:
    """Draw a batch of scenes.

    Args:
        batch: number of scenes.
        size: side of the images, in pixels.
        draw: the generator of all random draws.
    """
    maps = _label_maps(batch, size, draw)
    clean = _paint(maps.regions, draw)
    return Scenes(_degrade(clean, draw), *_targets(maps, clean[:, 1]))


def _uniform(draw: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=draw)


def _integer(draw: torch.Generator, low: int, high: int) -> int:
    """A random integer from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=draw))


@lru_cache(maxsize=512)
def _resizing(old: int, new: int, mode: str) -> Tensor:
    """The matrix (new, old) that resizes one axis. Matrix products are faster here than interpolation."""
    return F.interpolate(torch.eye(old)[None, None], (new, old), mode=mode)[0, 0]


def _slices_of_noise(draw: torch.Generator, channels: int, batch: int, cells: int, size: int) -> Tensor:
    """Smooth Gaussian noise that changes a little from slice to slice: (channels, batch, 3, size, size)."""
    middle, drift = torch.randn(2, channels, batch, 1, cells, cells, generator=draw)
    # Neighbouring slices differ more in some scenes than in others, as in volumes with thick and with thin slices.
    step = _uniform(draw, 0.0, 0.6, batch, 1, 1, 1) * torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)
    rows = _resizing(cells, size, "bicubic")
    return rows @ (middle + step * drift) @ rows.T


def _label_maps(batch: int, size: int, draw: torch.Generator) -> _LabelMaps:
    ground = _integer(draw, 3, 8)
    noise = _slices_of_noise(draw, ground, batch, _integer(draw, 3, 7), size)
    highest, regions = noise[0], torch.zeros(batch, 3, size, size, dtype=torch.int64)
    for number in range(1, ground):  # faster than a maximum over the leading axis
        regions.masked_fill_(noise[number] > highest, number)
        highest = torch.maximum(highest, noise[number])
    shapes = torch.zeros(REGIONS, dtype=torch.int64)
    elongated = torch.zeros(batch, REGIONS, dtype=torch.bool)
    warp = _slices_of_noise(draw, 2, batch, _integer(draw, 4, 9), size) * _uniform(draw, 0.0, 0.12, batch, 1, 1, 1)
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None] + warp[0], axis + warp[1]
    number = ground
    for _ in range(_integer(draw, 2, 6)):
        centre, radii, inside = _shape(batch, x, y, draw)
        drawn = inside & (_uniform(draw, 0, 1, batch, 1, 1, 1) < 0.7)
        regions.masked_fill_(drawn, number)
        shapes[number] = 1
        elongated[:, number] = (radii.amax(dim=0) > 1.7 * radii.amin(dim=0)).flatten()
        small = _within(batch, x, y, centre, radii, draw) & (_uniform(draw, 0, 1, batch, 1, 1, 1) < 0.5)
        # Half of the small shapes are cut off at the rim of the large shape, the others stick out.
        small &= drawn | ((_uniform(draw, 0, 1, batch, 1, 1, 1) < 0.5) & drawn.any(dim=(2, 3), keepdim=True))
        regions.masked_fill_(small, number + 1)
        shapes[number + 1] = 2
        number += 2
    body = (x / _uniform(draw, 0.6, 1.1, batch, 1, 1, 1)) ** 2 + (y / _uniform(draw, 0.6, 1.1, batch, 1, 1, 1)) ** 2 < 1
    regions.masked_fill_(~body & (_uniform(draw, 0, 1, batch, 1, 1, 1) < 0.35), AIR)
    return _LabelMaps(regions, shapes, elongated)


def _shape(batch: int, x: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw an ellipse or a rounded box.

    Args:
        batch: number of scenes.
        x: horizontal coordinate of every pixel.
        y: vertical coordinate of every pixel.
        draw: the generator of all random draws.

    Returns:
        Centres (2, batch, 3, 1, 1), radii (2, batch, 1, 1, 1), and which pixels are inside (batch, 3, size, size).
    """
    centre = _uniform(draw, -0.8, 0.8, 2, batch, 1, 1, 1) + _uniform(draw, -0.05, 0.05, 2, batch, 3, 1, 1)
    radii = 0.05 + 0.45 * _uniform(draw, 0, 1, 2, batch, 1, 1, 1) ** 1.5
    # The cross-section of a shape shrinks towards one of the neighbouring slices, because a shape ends somewhere.
    shrink = 1 + _uniform(draw, -0.35, 0.35, batch, 1, 1, 1) * torch.tensor([-1.0, 0, 1]).view(1, 3, 1, 1)
    angle = _uniform(draw, 0, math.pi, batch, 1, 1, 1)
    dx, dy = x - centre[0], y - centre[1]
    along = ((angle.cos() * dx + angle.sin() * dy) / (radii[0] * shrink)).square_()
    across = ((angle.cos() * dy - angle.sin() * dx) / (radii[1] * shrink)).square_()
    if float(_uniform(draw, 0, 1, 1)) < 0.3:
        along, across = along.square_(), across.square_()
    return centre, radii, along + across < 1


def _within(batch: int, x: Tensor, y: Tensor, centre: Tensor, radii: Tensor, draw: torch.Generator) -> Tensor:
    """Draw a smaller disc inside a shape or on its rim, and return which pixels it covers: (batch, 3, size, size)."""
    angle, far = _uniform(draw, 0, 2 * math.pi, batch, 1, 1, 1), _uniform(draw, 0, 0.9, batch, 1, 1, 1)
    radius = radii.amin(dim=0) * _uniform(draw, 0.35, 0.8, batch, 1, 1, 1)
    cx = centre[0] + radii.amin(dim=0) * far * angle.cos()
    cy = centre[1] + radii.amin(dim=0) * far * angle.sin()
    return (x - cx).square_() + (y - cy).square_() < radius**2


def _paint(regions: Tensor, draw: torch.Generator) -> Tensor:
    """Images with a random intensity and texture for every region: (batch, 3, size, size)."""
    batch, size = len(regions), regions.shape[-1]
    level = _uniform(draw, 0, 1, batch, REGIONS)
    rough = 0.12 * _uniform(draw, 0, 1, batch, REGIONS) ** 2
    coarse = 0.10 * _uniform(draw, 0, 1, batch, REGIONS) ** 2
    for table in (level, rough, coarse):
        table[:, AIR] *= 0.1
    flat = regions.flatten(1)
    level, rough, coarse = (table.gather(1, flat).view_as(regions) for table in (level, rough, coarse))
    fine = torch.randn(batch, 3, size, size, generator=draw)
    return level + rough * fine + coarse * _slices_of_noise(draw, 1, batch, _integer(draw, 10, 39), size)[0]


def _degrade(images: Tensor, draw: torch.Generator) -> Tensor:
    """Add a scanner's bias, blur, resolution, noise and contrast, and scale to [0, 1]."""
    batch, size = len(images), images.shape[-1]
    rows = _resizing(3, size, "bicubic")
    bias = rows @ torch.randn(batch, 1, 3, 3, generator=draw) @ rows.T * _uniform(draw, 0, 0.3, batch, 1, 1, 1)
    rows, columns = _point_spread(size, draw)
    images = rows @ (images * bias.exp()) @ columns.T
    images = images + torch.randn(images.shape, generator=draw) * (0.12 * _uniform(draw, 0, 1, batch, 1, 1, 1) ** 2)
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low + 1e-8)) ** torch.exp(_uniform(draw, -0.7, 0.7, batch, 1, 1, 1))
    alone = _uniform(draw, 0, 1, batch, 1, 1, 1) < 0.3
    return images.where(~alone, images[:, 1:2])


def _point_spread(size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Matrices (size, size) that blur rows and columns and, in some scenes, also reduce their resolution."""
    deviation = float(_uniform(draw, 0.1, 1.6, 1))
    distance = torch.arange(size)[:, None] - torch.arange(size)
    blur = torch.exp(-(distance**2) / (2 * deviation**2))
    blur = blur / blur.sum(dim=1, keepdim=True)
    coarser = float(_uniform(draw, 0, 1, 1)) < 0.6
    share, skew = float(_uniform(draw, 0.25, 1.0, 1)), float(_uniform(draw, 0.7, 1.0, 1))
    if not coarser:
        return blur, blur

    def resized(cells: int) -> Tensor:
        return _resizing(cells, size, "bicubic") @ _resizing(size, cells, "area") @ blur

    return resized(max(int(size * share), 4)), resized(max(int(size * share * skew), 4))


def _targets(maps: _LabelMaps, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the tasks (batch, tasks, size, size) and levels of the regions (batch, size, size) in the middle slice."""
    middle = maps.regions[:, 1]
    size = middle.shape[-1]
    flat = middle.flatten(1)
    shape = maps.shapes[middle]
    objects = shape > 0
    empty = torch.zeros(len(middle), REGIONS)
    area = empty.scatter_add(1, flat, torch.ones_like(clean).flatten(1))
    mean = empty.scatter_add(1, flat, clean.flatten(1)) / area.clamp(min=1)
    of_objects = (maps.shapes > 0) & (area > 0)
    largest = area.where(of_objects, -1).argmax(dim=1)[:, None, None]
    brightest = mean.where(of_objects, -math.inf).argmax(dim=1)[:, None, None]
    levels = mean.gather(1, flat).view_as(middle)
    median = clean.flatten(1).median(dim=1).values[:, None, None]
    padded = F.pad(middle[:, None].float(), (1, 1, 1, 1), mode="replicate")
    masks = {
        "objects": objects,
        "small objects": shape == 2,
        "elongated objects": maps.elongated.gather(1, flat).view_as(middle),
        "objects at the right": objects & (torch.arange(size) >= size // 2),
        "largest object": objects & (middle == largest),
        "brightest object": objects & (middle == brightest),
        "centre": middle == middle[:, size // 2, size // 2][:, None, None],
        "brighter": levels > median,
        "borders": (F.max_pool2d(padded, 3, 1) != -F.max_pool2d(-padded, 3, 1))[:, 0],
    }
    return torch.stack([masks[task] for task in TASKS], dim=1).float(), levels
