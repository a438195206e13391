"""Image strips: slices of the best, the median and the worst case of every site, with contours of truth and prediction."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO

import numpy as np
from contourpy import contour_generator
from markupsafe import Markup, escape
from nibabel import orientations
from numpy.typing import NDArray
from PIL import Image

from flapsam.base.errors import FlapsamError
from flapsam.learning.metrics import CaseScores
from flapsam.report.cases import CaseVolumes
from flapsam.report.section import Section, Strip
from flapsam.report.units import number
from flapsam.run.config import Samples
from flapsam.run.observer import Observer
from flapsam.volumes import COLOURS, Volume, canonical_slice_axis

PANELS = 5
"""Number of slices of a case."""
PIXELS = 144
"""Largest side of a slice's picture, small enough for a page with many sites."""
MARGIN = 0.25
"""Margin around the contours, as a fraction of their extent."""
GAP = 0.02
"""Gap between two slices, as a fraction of a slice's longer side."""


def strips(
    scores: Iterable[CaseScores], read: Callable[[CaseScores], CaseVolumes], samples: Samples, observer: Observer
) -> Section | None:
    """Image strips of the best, the median and the worst test case of every site; None if no case is tested.

    Args:
        scores: test scores of one mode.
        read: returns the volumes of a case, or raises FlapsamError.
        samples: the direction of the slices, and the range of intensities.
        observer: follows the cases.
    """
    chosen = chosen_cases(scores)
    if not chosen:
        return None
    drawn, missing = [], []
    observer.begin("image strips", len(chosen))
    for rank, score in chosen:
        try:
            drawn.append(_strip(rank, score, read(score), samples))
        except FlapsamError as error:
            missing.append(f"{score.site}, {score.case}: {error}")
        observer.step()
    observer.end()
    text = (
        "Slices of the best, the median and the worst test case of every site, ranked by mean Dice over the classes. The "
        "patient's right is on the left, as in radiology. Superior and anterior are at the top or on the left. These are "
        "images of patients, so be careful with whom you share this page."
    )
    if missing:
        text += f" {len(missing)} of {len(chosen)} cases cannot be shown, for example {missing[0]}"
    return Section("slices", "Best, median and worst cases", text, strips=drawn)


def chosen_cases(scores: Iterable[CaseScores]) -> list[tuple[str, CaseScores]]:
    """The best, the median and the worst case of every site, in this order, without repeating a case."""
    by_site: dict[str, list[tuple[float, str, CaseScores]]] = {}
    for score in scores:
        value = score.mean_dice
        if value is not None:
            by_site.setdefault(score.site, []).append((value, score.case, score))
    chosen = []
    for _, ranked in sorted(by_site.items()):
        ranked.sort(key=lambda scored: (-scored[0], scored[1]))
        places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
        taken = set()
        for rank, place in places.items():
            if place not in taken:
                taken.add(place)
                chosen.append((rank, ranked[place][2]))
    return chosen


def _strip(rank: str, score: CaseScores, volumes: CaseVolumes, samples: Samples) -> Strip:
    scores = "; ".join(
        f"{name} {number(dice)}" + (f" ({number(score.hd95[name], 1)} mm)" if score.hd95[name] is not None else "")
        for name, dice in score.dice.items()
    )
    title = f"{rank} case of {score.site}: {score.case}, Dice {scores}"
    drawn = draw_strip(volumes.image, volumes.truth, volumes.predicted, samples, title, score.site)
    return Strip(score.site, score.case, rank, scores, drawn)


def draw_strip(image: Volume, truth: Volume, predicted: Volume, samples: Samples, title: str, site: str = "") -> Markup:
    """Draw slices side by side as SVG, cropped to the contours and in true proportions.

    Args:
        image: the image. Of several modalities, the first is shown.
        truth: the true class indices.
        predicted: the predicted class indices.
        samples: the direction of the slices, and the range of intensities.
        title: what is shown, in words.
        site: the case's site, whose own range of intensities is used if it has one.
    """
    axis = canonical_slice_axis(image.affine, samples.axis)
    grey, true_labels, predicted_labels = (_stacked(volume, axis) for volume in (image, truth, predicted))
    spacing = np.empty(3)
    spacing[orientations.io_orientation(image.affine)[:, 0].astype(int)] = image.spacing
    down, across = (float(spacing[in_plane]) for in_plane in (2, 1, 0) if in_plane != axis)
    occupied = (true_labels > 0) | (predicted_labels > 0)
    rows, columns = _box(np.any(occupied, axis=0), down, across)
    low, high = samples.site_clip.get(site) or samples.clip or np.percentile(grey[:, rows, columns], (0.5, 99.5))
    height, width = (rows.stop - rows.start) * down, (columns.stop - columns.start) * across
    side = max(height, width)
    pitch = width / side + GAP
    parts = []
    for index, number_of in enumerate(_places(occupied)):
        shown = np.clip((grey[number_of, rows, columns] - float(low)) / max(float(high - low), 1e-6), 0, 1)
        contours = [
            f'<path class="{kind}" style="stroke:{COLOURS[(value - 1) % len(COLOURS)]}" d="{path}"/>'
            for kind, labels in (("truth", true_labels), ("prediction", predicted_labels))
            for value in range(1, int(max(true_labels.max(), predicted_labels.max())) + 1)
            if (path := _outline(labels[number_of, rows, columns] == value, down / side, across / side))
        ]
        parts.append(
            f'<g transform="translate({index * pitch:.4f} 0)">'
            f'<image width="{width / side:.4f}" height="{height / side:.4f}" preserveAspectRatio="none" '
            f'href="data:image/jpeg;base64,{_jpeg(shown)}"/>{"".join(contours)}</g>'
        )
    total = PANELS * pitch - GAP
    name = escape(title)
    return Markup(
        f'<svg class="strip" viewBox="0 0 {total:.4f} {height / side:.4f}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )


def _stacked(volume: Volume, axis: int) -> NDArray:
    """A volume as (slice, row, column), with superior and anterior up or left, and the patient's right on the left."""
    array = volume.to_canonical().array
    array = array[..., 0] if array.ndim == 4 else array
    return np.moveaxis(array, axis, 0)[:, ::-1, ::-1].swapaxes(1, 2)


def _places(occupied: NDArray[np.bool_]) -> Sequence[int]:
    """Indices of slices, spread evenly over those that hold any label."""
    slices = np.flatnonzero(occupied.any(axis=(1, 2)))
    if not len(slices):
        slices = np.arange(len(occupied))
    return [int(slices[int((index + 0.5) * len(slices) / PANELS)]) for index in range(PANELS)]


def _box(occupied: NDArray[np.bool_], down: float, across: float) -> tuple[slice, slice]:
    """Rows and columns of a square, in mm, around the labels and inside the slice; the whole slice without any label."""
    if not occupied.any():
        return slice(0, occupied.shape[0]), slice(0, occupied.shape[1])
    ends = [np.flatnonzero(occupied.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    half = max((e[1] + 1 - e[0]) * mm for e, mm in zip(ends, (down, across), strict=True)) * (0.5 + MARGIN)
    box = []
    for (first, last), mm, size in zip(ends, (down, across), occupied.shape, strict=True):
        centre, reach = (first + last + 1) / 2, max(half / mm, 8)
        box.append(slice(max(round(centre - reach), 0), min(round(centre + reach), size)))
    return box[0], box[1]


def _jpeg(shown: NDArray) -> str:
    picture = Image.fromarray(np.uint8(np.round(255 * shown)))
    picture.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80, optimize=True)
    return b64encode(buffer.getvalue()).decode()


def _outline(mask: NDArray[np.bool_], down: float, across: float) -> str:
    """The outline of a mask as an SVG path."""
    if not mask.any():
        return ""
    # Padding closes outlines at the border. It moves the centre of voxel 0 to 1, and its edge to 0.5.
    lines = contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    return "".join(
        "M" + "L".join(f"{(x - 0.5) * across:.3f} {(y - 0.5) * down:.3f}" for x, y in np.asarray(line)) + "Z"
        for line in lines
    )
