"""Segment a volume slice by slice, in batches, without prompts.

The next slices are cut and scaled while the network works on the current ones. Only the label map is kept in memory, unless
probabilities are requested or averaged over planes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.base.prefetch import ahead
from flapsam.learning.cleaning import fill_holes, keep_largest
from flapsam.learning.slices import SliceStack, from_square, stack_of, to_square
from flapsam.run.config import Samples
from flapsam.sam import Sam
from flapsam.volumes import CANONICAL_AXES, Volume, canonical_slice_axis, room

Precision = Literal["fp32", "bf16", "fp16"]
HALF: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIRRORED = {"x": 0, "y": 1, "z": 2}
"""Canonical axis of each letter: x runs from left to right, y from back to front, z from foot to head."""
Turns = Sequence[tuple[int, ...]]
"""Dimensions of (…, height, width) to flip, one tuple for each pass through the network."""
CERTAIN = 65535
"""Stored value of probability 1."""
BUDGET = 2**30
"""Bytes that the slices in one pass through the network may take, roughly."""
EVERY = slice(None)
Batch = tuple[list[int], Tensor, list[int], slice]
"""Indices of slices, images, which may be of more slices, indices of blank slices, and which of the images are wanted."""
WORTH = 1.2
"""How many times faster than fp32 a lower precision must be to be chosen."""


@dataclass(frozen=True)
class PredictionOptions:
    """Optional steps beyond predicting every slice once. Each takes time and is off by default."""

    flips: str = ""
    """Average over the slice and its mirror images along these axes, such as ``x`` (left and right swap) or ``xy``. Only
    axes that lie in the slice have an effect."""
    planes: bool = False
    """Average over sagittal, coronal and axial slices."""
    largest: bool = False
    """Keep only the largest connected component of every class."""
    fill: bool = False
    """Fill the holes of every class."""
    probabilities: bool = False
    """Return the probabilities, too."""

    def __post_init__(self) -> None:
        """Raise FlapsamError for an unknown axis."""
        if not set(self.flips) <= MIRRORED.keys():
            raise FlapsamError(
                f"flips '{self.flips}' names an unknown axis; use x (left to right), y (back to front) and z (foot to head)"
            )


@dataclass(frozen=True)
class Prediction:
    """A volume's label map, and its probabilities if requested."""

    labels: NDArray[np.uint8]
    """Class indices (i, j, k), with 0 for background."""
    probabilities: NDArray[np.uint16] | None = None
    """Probabilities (i, j, k, class), where 65535 stands for 1."""


def predict_volume(
    network: Sam,
    volume: Volume,
    samples: Samples,
    *,
    batch: int | None = None,
    precision: Precision = "fp32",
    site: str = "",
    options: PredictionOptions = PredictionOptions(),
    on_slices: Callable[[int, int], None] = lambda count, of: None,
) -> Prediction:
    """Segment a volume in its own axes and shape, whatever its orientation.

    Args:
        network: the network with its trained parameters.
        volume: the image.
        samples: how it is cut and scaled.
        batch: number of slices per pass through the network; as many as fit if None.
        precision: precision of the image encoder.
        site: the volume's site, which matters where sites clip intensities differently.
        options: optional steps beyond predicting every slice once.
        on_slices: called with the number of slices just done and the total.

    Raises:
        FlapsamError: there is no room for the label map or the probabilities.
    """
    shape, affine = volume.geometry
    labels = room("label map", shape, np.uint8)
    maps = None
    if options.planes or options.probabilities:
        maps = room("probabilities", (*shape, network.masks), np.uint16)
    planes = list(CANONICAL_AXES) if options.planes else [samples.axis]
    stacks = [stack_of(volume, samples.model_copy(update={"axis": plane}), site) for plane in planes]
    total = sum(len(stack) for stack in stacks)
    for number, (plane, stack) in enumerate(zip(planes, stacks, strict=True)):
        axis = canonical_slice_axis(affine, plane)
        labels_view = _in_slices(labels, affine, axis)
        maps_view = None if maps is None else _in_slices(maps, affine, axis)
        for indices, probabilities in class_probabilities(
            network, stack, batch=batch, precision=precision, turns=_turns(options.flips, axis)
        ):
            if maps_view is not None:
                shares = (probabilities * (CERTAIN / len(planes))).round().movedim(1, -1).cpu().numpy().astype(np.uint16)
                maps_view[indices] = shares if number == 0 else maps_view[indices] + shares
            if len(planes) == 1:
                labels_view[indices] = _largest(probabilities)
            on_slices(len(indices), total)
    if maps is not None and options.planes:
        for k in range(shape[2]):
            labels[:, :, k] = maps[:, :, k].argmax(axis=-1)
    if options.largest:
        keep_largest(labels)
    if options.fill:
        fill_holes(labels)
    return Prediction(labels, maps if options.probabilities else None)


def predict_stack(
    network: Sam, stack: SliceStack, *, batch: int | None = None, precision: Precision = "fp32"
) -> NDArray[np.uint8]:
    """Segment a stack into class indices (slices, height, width)."""
    labels = np.empty(stack.shape, np.uint8)
    for indices, probabilities in class_probabilities(network, stack, batch=batch, precision=precision):
        labels[indices] = _largest(probabilities)
    return labels


def class_probabilities(
    network: Sam, stack: SliceStack, *, batch: int | None = None, precision: Precision = "fp32", turns: Turns = ((),)
) -> Iterator[tuple[list[int], Tensor]]:
    """Compute the class probabilities, a few slices at a time.

    They are resized to the slice's own grid. Slices that reach the network as zeros only, such as air, all look the same to
    it. Only the first of these is predicted, and the others take its probabilities.

    Args:
        network: the network with its trained parameters.
        stack: the slices.
        batch: number of slices per pass through the network; as many as fit if None. Where slices meet, those before and
            after them that their logits depend on pass through its encoder, too.
        precision: precision of the image encoder. The decoder always runs in fp32.
        turns: mirror images to average over.

    Yields:
        Indices of slices, and their probabilities (slices, classes + 1, height, width) on the network's device.
    """
    network.eval()
    device = network.pixel_mean.device
    resize, shape = stack.samples.resize, stack.shape[1:]
    batch = batch or slices_at_once(network, shape)
    blank_probabilities = None
    batches = _runs(network, stack, batch) if network.reach else _batches(network, stack, batch)
    with closing(ahead(batches)) as batches:
        for indices, images, blanks, halo in batches:
            if indices:
                with torch.inference_mode():
                    squares = images.to(device)
                    probabilities = torch.stack(
                        [_logits(network, squares.flip(axes), precision, halo).softmax(1).flip(axes) for axes in turns]
                    ).mean(0)
                    probabilities = from_square(probabilities, shape, resize)
                yield indices, probabilities
                if blanks and blank_probabilities is None:
                    blank_probabilities = probabilities[indices.index(blanks[0])]
            repeats = blanks[1:] if blanks and blanks[0] in indices else blanks
            while repeats and blank_probabilities is not None:
                current, repeats = repeats[:batch], repeats[batch:]
                yield current, blank_probabilities.expand(len(current), -1, -1, -1)


def _runs(network: Sam, stack: SliceStack, batch: int) -> Iterator[Batch]:
    """Yield consecutive slices, with those before and after them that their logits depend on. None counts as blank."""
    reach, count = network.reach, len(stack)
    for start in range(0, count, batch):
        end = min(start + batch, count)
        first, last = max(start - reach, 0), min(end + reach, count)
        images = torch.cat(
            [to_square(stack.window(i), network.image_size, stack.samples.resize) for i in range(first, last)]
        )
        yield list(range(start, end)), images, [], slice(start - first, end - first)


def _batches(network: Sam, stack: SliceStack, batch: int) -> Iterator[Batch]:
    """Yield the slices to predict, their images, and the slices that are blank.

    Only the first blank slice of the stack is among those to predict.
    """
    indices, images, blanks, blank_seen = [], [], [], False
    for index in range(len(stack)):
        image = stack.window(index)
        blank = not bool(image.any())
        if blank:
            blanks.append(index)
        if not (blank and blank_seen):
            indices.append(index)
            images.append(to_square(image, network.image_size, stack.samples.resize))
        blank_seen |= blank
        if len(indices) == batch or index == len(stack) - 1:
            yield indices, torch.cat(images) if images else torch.empty(0), blanks, EVERY
            indices, images, blanks = [], [], []


def slices_at_once(network: Sam, shape: tuple[int, ...]) -> int:
    """Number of slices (height, width) to predict in a pass: 8 on a CPU, 64 elsewhere, or fewer if only fewer fit.

    The estimate counts the encoder's largest layers and the probabilities at the slices' own size, each of them three times
    in fp32.
    """
    a_slice = 3 * 4 * (network.sizes.values_a_slice(network.image_size) + network.masks * shape[0] * shape[1])
    most = 8 if network.pixel_mean.device.type == "cpu" else 64
    # Where slices meet, the ends of a run pass through the network twice, so it is worthwhile to have long runs.
    ends = 2 * network.reach
    return max(min(max(most, 3 * ends), BUDGET // a_slice) - ends, 1)


def fastest_precision(network: Sam) -> Precision:
    """Measure briefly which precision is fastest on the network's device.

    Returns:
        The fastest precision if it is more than ``WORTH`` times as fast as fp32, otherwise fp32.
    """
    device = network.pixel_mean.device
    images = torch.rand(slices_at_once(network, (1, 1)), 1, network.image_size, network.image_size, device=device)
    candidates: list[Precision] = ["fp32", "bf16"] if device.type == "cpu" else ["fp32", "bf16", "fp16"]
    seconds = {candidate: _seconds(network, images, candidate) for candidate in candidates}
    best = min(candidates, key=lambda candidate: seconds[candidate])
    return best if seconds[best] * WORTH < seconds["fp32"] else "fp32"


@torch.inference_mode()
def _seconds(network: Sam, images: Tensor, precision: Precision) -> float:
    """Seconds of the faster of two passes after a warm-up. Infinite where the device lacks the precision."""
    times = []
    try:
        for _ in range(3):
            began = time.perf_counter()
            _logits(network, images, precision).sum().item()
            times.append(time.perf_counter() - began)
    except (RuntimeError, NotImplementedError, TypeError):
        return float("inf")
    return min(times[1:])


def _logits(network: Sam, images: Tensor, precision: Precision, wanted: slice = EVERY) -> Tensor:
    half = HALF.get(precision)
    with torch.autocast(images.device.type, half or torch.bfloat16, enabled=half is not None):
        embedding = network.embed(images.expand(-1, 3, -1, -1))
    return network.logits(embedding[wanted].float())


def _turns(flips: str, axis: int) -> Turns:
    """All combinations of the flips that lie in slices perpendicular to a canonical axis, starting with no flip."""
    in_plane = [direction for direction in MIRRORED.values() if direction != axis]
    flipped = {MIRRORED[name] for name in flips}
    chosen = [position - 2 for position, direction in enumerate(in_plane) if direction in flipped]
    return [turn for count in range(len(chosen) + 1) for turn in combinations(chosen, count)]


def _largest(probabilities: Tensor) -> NDArray[np.uint8]:
    """Class with the largest probability (slices, height, width). On a tie, the first class wins."""
    # Classes are compared one by one, because argmax along any axis but the last takes ten times as long on a CPU.
    best, labels = probabilities[:, 0], torch.zeros_like(probabilities[:, 0], dtype=torch.uint8)
    for value, of_class in enumerate(probabilities.unbind(1)):
        labels.masked_fill_(of_class > best, value)
        best = torch.maximum(best, of_class)
    return labels.cpu().numpy()


def _in_slices(array: NDArray, affine: NDArray[np.float64], axis: int) -> NDArray:
    """A writable view (slices, height, width, …) of an array that is in the volume's axes."""
    return np.moveaxis(Volume(array, affine).to_canonical().array, axis, 0)
