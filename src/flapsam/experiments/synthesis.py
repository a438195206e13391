"""Images made from nothing: random label maps with random intensities, for pretraining without any data.

A scene is cut into cells of random place, size and elongation, ellipses with parts of their own are laid on it, and smooth
noise bends it all; every region gets its own random intensity and texture; then come bias, blur, lower resolution, noise and
contrast. Such synthesis alone gives features that carry over to real CT and MRI (SynthSeg: Billot et al., Medical Image
Analysis 2023, arXiv 2107.09559; Dey et al., ICLR 2025, arXiv 2411.02372). A scene is three adjacent slices of a volume, so
that the network can learn from its neighbours too.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS = (
    "brighter",
    "brighter than around",
    "like the centre",
    "centre",
    "right half",
    "upper half",
    "thin",
    "thick",
    "borders",
)
"""Masks that are asked for, without any prompt. A pixel belongs to one if its region is brighter than the median pixel;
brighter than what surrounds it; about as bright as the region at the middle; the region at the middle itself; if the pixel
lies right of, or above, what is near of its own region; if its own region takes little, or much, of its neighbourhood; if it
is on a border between regions."""

FIELDS = ("level", "level around", "x from centre", "y from centre", "near share", "far share")
"""Values that are asked for at every pixel: mean intensity of its region before bias, blur and noise, and of what surrounds
it, both standardised by scene; way to the centre of what is near of its own region; share of its own region in a near and in
a far neighbourhood."""

TASKS = MASKS + FIELDS

STRIDE = 2
"""Truth is given for every second row and column, a random one of the two: more would cost more than the network."""
NEAR, FAR = 0.04, 0.11
"""Deviation of the Gaussian neighbourhoods, as a share of the image's side."""

REGIONS = 32
"""Most regions of a scene: cells, shapes, parts of shapes, skin, air."""
SKIN, AIR = REGIONS - 2, REGIONS - 1


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes."""

    images: Tensor
    """(batch, 3, size, size) in [0, 1]: the slice below, the slice itself, the slice above."""
    masks: Tensor
    """(batch, masks, size / 2, size / 2), 0 or 1, of the slice itself."""
    fields: Tensor
    """(batch, fields, size / 2, size / 2)."""
    corner: tuple[int, int]
    """The first row and column that the truth is for."""


def draw_scenes(batch: int, size: int, draw: torch.Generator) -> Scenes:
    """Make scenes that depend on ``draw`` alone.

    Args:
        batch: number of scenes.
        size: side in pixels, a multiple of 4.
        draw: the only source of chance.
    """
    # Each label map is painted twice, so that what is common to both is the anatomy.
    regions = _label_maps((batch + 1) // 2, size, draw).repeat(2, 1, 1, 1)[:batch]
    clean = _paint(regions, draw)
    corner = (_integer(draw, 0, STRIDE - 1), _integer(draw, 0, STRIDE - 1))
    return Scenes(_degrade(clean, draw), *truth(regions[:, 1], clean[:, 1], corner), corner)


def _uniform(draw: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=draw)


def _integer(draw: torch.Generator, low: int, high: int) -> int:
    """Of low, …, high."""
    return int(torch.randint(low, high + 1, (1,), generator=draw))


@lru_cache(maxsize=512)
def _resizing(given: int, wanted: int, mode: str) -> Tensor:
    """What resizes one axis, as a matrix (wanted, given): products are faster here than interpolation."""
    return F.interpolate(torch.eye(given)[None, None], (wanted, given), mode=mode)[0, 0]


@lru_cache(maxsize=8)
def _gaussian(size: int, deviation: float) -> Tensor:
    """What blurs one axis, as a matrix (size, size) whose rows have the sum 1."""
    distance = torch.arange(size)[:, None] - torch.arange(size)
    weights = torch.exp(-(distance**2) / (2 * deviation**2))
    return weights / weights.sum(dim=1, keepdim=True)


def _slices_of_noise(draw: torch.Generator, channels: int, batch: int, cells: int, size: int) -> Tensor:
    """Smooth normal noise that changes a little from slice to slice: (channels, batch, 3, size, size)."""
    middle, drift = torch.randn(2, channels, batch, 1, cells, cells, generator=draw)
    # Slices of thick and of thin volumes: how far a neighbour has gone differs by scene.
    step = _uniform(draw, 0.0, 0.6, batch, 1, 1, 1) * torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)
    rows = _resizing(cells, size, "bicubic")
    return rows @ (middle + step * drift) @ rows.T


def _label_maps(batch: int, size: int, draw: torch.Generator) -> Tensor:
    """The number of each pixel's region: (batch, 3, size, size)."""
    bend = _slices_of_noise(draw, 2, batch, _integer(draw, 4, 9), size) * _uniform(draw, 0.0, 0.12, batch, 1, 1, 1)
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None] + bend[0], axis + bend[1]
    x, y = x.flatten(2), y.flatten(2)
    one = torch.ones_like(x[0])
    cells, shapes = _integer(draw, 2, 12), _integer(draw, 2, 9)
    whole = _ellipses(draw, shapes, batch, 0.05, 0.5, reach=0.8)
    ellipses = [_ellipses(draw, cells, batch, 0.5, 1.5, reach=1.0), whole, _parts(draw, whole), _body(draw, batch)]
    forms = torch.cat([_quadratic_form(each) for each in ellipses], dim=2)
    there = _uniform(draw, 0, 1, batch, shapes) < 0.7
    has_part = there & (_uniform(draw, 0, 1, batch, shapes) < 0.6)
    # Half of the parts end where their shape ends, the others stick out of it.
    sticks_out = _uniform(draw, 0, 1, batch, shapes) < 0.5
    skin = _uniform(draw, 0.6, 1.0, batch).where(_uniform(draw, 0, 1, batch) < 0.5, math.inf)
    bare = _uniform(draw, 0, 1, batch) < 0.5
    regions = torch.zeros(batch, 3, size * size, dtype=torch.int64)
    for scene, map in enumerate(regions):  # one at a time stays in the processor's cache
        u, v = x[scene], y[scene]
        distances = (forms[scene] @ torch.stack([u * u, u * v, v * v, u, v, one], dim=1)).unbind(dim=1)
        nearest = distances[0]
        for cell in range(1, cells):
            map.masked_fill_(distances[cell] < nearest, cell)
            nearest = torch.minimum(nearest, distances[cell])
        for shape in range(shapes):
            if there[scene, shape]:
                inside = distances[cells + shape] < 1
                map.masked_fill_(inside, cells + 2 * shape)
                if has_part[scene, shape]:
                    inner = distances[cells + shapes + shape] < 1
                    map.masked_fill_(inner if sticks_out[scene, shape] else inner & inside, cells + 2 * shape + 1)
        if not bare[scene]:
            map.masked_fill_(distances[-1] > skin[scene], SKIN)
            map.masked_fill_(distances[-1] > 1, AIR)
    return regions.unflatten(2, (size, size))


@dataclass(frozen=True)
class _Ellipses:
    """Centres and radii (batch, 3, count), in units of half the image's side, and angles of as many ellipses."""

    x: Tensor
    y: Tensor
    along: Tensor
    across: Tensor
    angle: Tensor


def _ellipses(draw: torch.Generator, count: int, batch: int, least: float, most: float, reach: float) -> _Ellipses:
    drift = torch.tensor([-1.0, 0.0, 1.0])[:, None]
    x, y = _uniform(draw, -reach, reach, 2, batch, 1, count) + _uniform(draw, -0.05, 0.05, 2, batch, 3, count)
    along, across = least + (most - least) * _uniform(draw, 0, 1, 2, batch, 1, count) ** 1.5
    # A shape ends somewhere: its cross-section shrinks towards one side.
    shrink = 1 + _uniform(draw, -0.35, 0.35, batch, 1, count) * drift
    return _Ellipses(x, y, along * shrink, across * shrink, _uniform(draw, 0, math.pi, batch, 1, count).expand_as(x))


def _parts(draw: torch.Generator, whole: _Ellipses) -> _Ellipses:
    """Smaller ellipses in or on the rim of others, a third of them with the same centre and direction."""
    batch, _, count = whole.x.shape
    turn, far = _uniform(draw, 0, 2 * math.pi, batch, 1, count), _uniform(draw, 0, 1.0, batch, 1, count)
    same = _uniform(draw, 0, 1, batch, 1, count) < 0.33
    far = far.where(~same, 0.0)
    along, across = whole.along * far * turn.cos(), whole.across * far * turn.sin()
    x = whole.x + whole.angle.cos() * along - whole.angle.sin() * across
    y = whole.y + whole.angle.sin() * along + whole.angle.cos() * across
    factor = _uniform(draw, 0.35, 0.8, batch, 1, count)
    radius = torch.minimum(whole.along, whole.across) * factor
    return _Ellipses(
        x, y, (whole.along * factor).where(same, radius), (whole.across * factor).where(same, radius), whole.angle
    )


def _body(draw: torch.Generator, batch: int) -> _Ellipses:
    """One large ellipse a scene; what lies outside is air."""
    zero = torch.zeros(batch, 3, 1)
    along, across = _uniform(draw, 0.6, 1.1, 2, batch, 1, 1).expand(2, batch, 3, 1)
    return _Ellipses(zero, zero, along, across, zero)


def _quadratic_form(ellipses: _Ellipses) -> Tensor:
    """What makes of x², x·y, y², x, y and 1 the square of the distance to the centre, 1 on the rim: (batch, 3, count, 6)."""
    cosine, sine = ellipses.angle.cos(), ellipses.angle.sin()
    u, v = ellipses.along**-2, ellipses.across**-2
    xx, xy, yy = u * cosine**2 + v * sine**2, 2 * (u - v) * cosine * sine, u * sine**2 + v * cosine**2
    x, y = ellipses.x, ellipses.y
    linear = -2 * xx * x - xy * y, -xy * x - 2 * yy * y
    return torch.stack([xx, xy, yy, *linear, xx * x**2 + xy * x * y + yy * y**2], dim=3)


def _paint(regions: Tensor, draw: torch.Generator) -> Tensor:
    """An intensity and a texture for every region: (batch, 3, size, size)."""
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
    """What a scanner does: bias, blur, resolution, noise, contrast, saturation; scaled to [0, 1]."""
    batch, size = len(images), images.shape[-1]
    rows = _resizing(3, size, "bicubic")
    bias = rows @ torch.randn(batch, 1, 3, 3, generator=draw) @ rows.T * _uniform(draw, 0, 0.3, batch, 1, 1, 1)
    rows, columns = _point_spread(size, draw)
    images = rows @ (images * bias.exp()) @ columns.T
    images = images + torch.randn(images.shape, generator=draw) * (0.12 * _uniform(draw, 0, 1, batch, 1, 1, 1) ** 2)
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    span = high - low
    low, high = low + span * _saturated(draw, batch), high - span * _saturated(draw, batch)
    images = ((images - low) / (high - low + 1e-8)).clamp(0, 1) ** torch.exp(_uniform(draw, -0.7, 0.7, batch, 1, 1, 1))
    alone = _uniform(draw, 0, 1, batch, 1, 1, 1) < 0.3
    return images.where(~alone, images[:, 1:2])


def _saturated(draw: torch.Generator, batch: int) -> Tensor:
    """Share of the intensities that is cut off at one end, in half of the scenes: (batch, 1, 1, 1)."""
    share = _uniform(draw, 0.0, 0.25, batch, 1, 1, 1)
    return share.where(_uniform(draw, 0, 1, batch, 1, 1, 1) < 0.5, 0.0)


def _point_spread(size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blur, then perhaps coarser pixels resized to the grid, of rows and of columns: (size, size) each."""
    blur = _gaussian(size, float(_uniform(draw, 0.1, 1.6, 1)))
    coarser = float(_uniform(draw, 0, 1, 1)) < 0.6
    share, skew = float(_uniform(draw, 0.25, 1.0, 1)), float(_uniform(draw, 0.7, 1.0, 1))
    if not coarser:
        return blur, blur

    def resized(cells: int) -> Tensor:
        return _resizing(cells, size, "bicubic") @ _resizing(size, cells, "area") @ blur

    return resized(max(int(size * share), 4)), resized(max(int(size * share * skew), 4))


def truth(regions: Tensor, clean: Tensor, corner: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks (batch, masks, size / 2, size / 2) and fields (batch, fields, size / 2, size / 2) of one slice.

    Neighbourhoods are Gaussian and taken over cells of 2 × 2 of these pixels.

    Args:
        regions: (batch, size, size).
        clean: (batch, size, size), before bias, blur and noise.
        corner: the first row and column that the truth is for.
    """
    batch, size = len(regions), regions.shape[-1]
    centre = regions[:, size // 2, size // 2, None, None]
    padded = F.pad(regions[:, None].float(), (1, 1, 1, 1), mode="replicate")
    borders = (F.max_pool2d(padded, 3, 1) != -F.max_pool2d(-padded, 3, 1))[:, 0]
    taken = (slice(None), slice(corner[0], None, STRIDE), slice(corner[1], None, STRIDE))
    regions, clean, borders = regions[taken], clean[taken], borders[taken]
    side = size // STRIDE
    flat = regions.flatten(1)
    count = torch.zeros(batch, REGIONS).scatter_add(1, flat, torch.ones(batch, side * side))
    mean = torch.zeros(batch, REGIONS).scatter_add(1, flat, clean.flatten(1)) / count.clamp(min=1)
    levels = mean.gather(1, flat).view_as(clean)
    middle = mean.gather(1, centre[:, 0])[..., None]
    scale = levels.std(dim=(1, 2), keepdim=True) + 0.05

    own = torch.zeros(batch, REGIONS, side * side).scatter_(1, flat[:, None], 1.0).unflatten(2, (side, side))
    own = F.avg_pool2d(own, 2)
    cells = side // 2
    # Of every pixel the number of its cell in its own region's plane.
    places = torch.arange(side) // 2
    index = (flat * cells**2 + (places[:, None] * cells + places).flatten()).unsqueeze(1)

    def at_own(planes: Tensor) -> Tensor:
        """(batch, REGIONS, cells, cells) → (batch, side, side)."""
        return planes.flatten(1).gather(1, index[:, 0]).view(batch, side, side)

    near, far = _gaussian(cells, NEAR * cells), _gaussian(cells, FAR * cells)
    near_share, far_planes = at_own(near @ own @ near.T), far @ own @ far.T
    far_share = at_own(far_planes)
    along = torch.linspace(-1, 1, cells)
    here = along[places]
    x = at_own(far @ (own * along) @ far.T) / far_share - here
    y = at_own(far @ (own * along[:, None]) @ far.T) / far_share - here[:, None]
    total = at_own((far_planes * mean[..., None, None]).sum(dim=1, keepdim=True).expand_as(own))
    around = (total - levels * far_share) / (1 - far_share).clamp(min=0.02)
    around = around.where(far_share < 0.98, levels)

    median = clean.flatten(1).median(dim=1).values[:, None, None]
    masks = {
        "brighter": levels > median,
        "brighter than around": levels > around,
        "like the centre": (levels - middle).abs() < 0.1,
        "centre": regions == centre,
        "right half": x < 0,
        "upper half": y > 0,
        "thin": near_share < 0.5,
        "thick": far_share > 0.6,
        "borders": borders,
    }
    offset = levels.mean(dim=(1, 2), keepdim=True)
    fields = {
        "level": (levels - offset) / scale,
        "level around": (around - offset) / scale,
        "x from centre": x / FAR,
        "y from centre": y / FAR,
        "near share": 4 * near_share - 3,
        "far share": 4 * far_share - 2,
    }
    return (
        torch.stack([masks[name] for name in MASKS], dim=1).float(),
        torch.stack([fields[name] for name in FIELDS], dim=1),
    )
