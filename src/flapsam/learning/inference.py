"""Volume → label map: every slice once, in batches, without prompts.

Slices stream through the network while the next ones are cut and scaled; only the label map is kept, unless probabilities
are wanted or have to be added up.
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
"""Canonical axes: from left to right, from back to front, from foot to head."""
Turns = Sequence[tuple[int, ...]]
"""Dimensions of (…, height, width) that are turned round, an entry a pass through the network."""
CERTAIN = 65535
"""What probability 1 is kept as."""
BUDGET = 2**30
"""Bytes that the slices at once in the network may take, roughly."""
WORTH = 1.2
"""How many times faster a shorter precision must be, to be chosen."""


@dataclass(frozen=True)
class PredictionOptions:
    """What is done beyond predicting every slice once; all of it takes time, none is done unless asked for."""

    flips: str = ""
    """Average over the slice and its mirror images along these axes, such as ``x`` (left and right change places) or ``xy``;
    those that lie in the slice count."""
    planes: bool = False
    """Average over sagittal, coronal and axial slices."""
    largest: bool = False
    """Keep only the largest connected component of every class."""
    fill: bool = False
    """Fill holes in every class with it."""
    probabilities: bool = False
    """Keep the probabilities, too."""

    def __post_init__(self) -> None:
        """Raise FlapsamError for an axis that there is not."""
        if not set(self.flips) <= MIRRORED.keys():
            raise FlapsamError(
                f"flips '{self.flips}': name axes by x (left to right), y (back to front) and z (foot to head)"
            )


@dataclass(frozen=True)
class Prediction:
    """A volume's label map, and its probabilities if they were asked for."""

    labels: NDArray[np.uint8]
    """(i, j, k): 0 is background."""
    probabilities: NDArray[np.uint16] | None = None
    """(i, j, k, class), of which 65535 is 1."""


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
        network: with the trained parameters.
        volume: the image.
        samples: how it is cut and scaled.
        batch: slices at once; as many as fit if not given.
        precision: of the image encoder.
        site: whose the volume is, where sites are clipped differently.
        options: what is done beyond that.
        on_slices: called with the number of slices just done, and of all.

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
    """Class indices (slices, height, width) of a stack."""
    labels = np.empty(stack.shape, np.uint8)
    for indices, probabilities in class_probabilities(network, stack, batch=batch, precision=precision):
        labels[indices] = _largest(probabilities)
    return labels


def class_probabilities(
    network: Sam, stack: SliceStack, *, batch: int | None = None, precision: Precision = "fp32", turns: Turns = ((),)
) -> Iterator[tuple[list[int], Tensor]]:
    """Probabilities of the classes, a few slices after the other.

    They are resized to the slice's own grid. Slices that the network sees as nothing but zeros, such as air, all look the
    same to it: the first of them is predicted.

    Args:
        network: with the trained parameters.
        stack: the slices.
        batch: slices at once; as many as fit if not given.
        precision: of the image encoder; the decoder always has fp32.
        turns: mirror images that are averaged.

    Yields:
        Numbers of slices, and (slices, classes + 1, height, width) on the network's device.
    """
    network.eval()
    device = network.pixel_mean.device
    resize, shape = stack.samples.resize, stack.shape[1:]
    batch = batch or slices_at_once(network, shape)
    of_blank = None
    with closing(ahead(_batches(network, stack, batch))) as batches:
        for indices, images, blanks in batches:
            if indices:
                with torch.inference_mode():
                    squares = images.to(device)
                    probabilities = torch.stack(
                        [_logits(network, squares.flip(axes), precision).softmax(1).flip(axes) for axes in turns]
                    ).mean(0)
                    probabilities = from_square(probabilities, shape, resize)
                yield indices, probabilities
                if blanks and of_blank is None:
                    of_blank = probabilities[indices.index(blanks[0])]
            again = blanks[1:] if blanks and blanks[0] in indices else blanks
            while again and of_blank is not None:
                some, again = again[:batch], again[batch:]
                yield some, of_blank.expand(len(some), -1, -1, -1)


def _batches(network: Sam, stack: SliceStack, batch: int) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """Slices that go through the network, their images, and which slices are blank; of all blanks only the first goes."""
    indices, images, blanks, known = [], [], [], False
    for index in range(len(stack)):
        image = stack.window(index)
        blank = not bool(image.any())
        if blank:
            blanks.append(index)
        if not (blank and known):
            indices.append(index)
            images.append(to_square(image, network.image_size, stack.samples.resize))
        known |= blank
        if len(indices) == batch or index == len(stack) - 1:
            yield indices, torch.cat(images) if images else torch.empty(0), blanks
            indices, images, blanks = [], [], []


def slices_at_once(network: Sam, shape: tuple[int, ...]) -> int:
    """How many slices of (height, width) go through the network at once: 8, or 64 on a GPU, or as many as fit.

    What counts is the attention's bias, the inside of the MLPs, and the probabilities at the slices' own size, all a few
    times over.
    """
    sizes, tokens = network.sizes, (network.image_size // network.sizes.patch) ** 2
    a_slice = 3 * 4 * (sizes.heads * tokens**2 + 4 * sizes.width * tokens + network.masks * shape[0] * shape[1])
    return max(min(8 if network.pixel_mean.device.type == "cpu" else 64, BUDGET // a_slice), 1)


def fastest_precision(network: Sam) -> Precision:
    """The precision that is fastest where the network is, by a short measurement; fp32 unless another is worth it."""
    device = network.pixel_mean.device
    images = torch.rand(slices_at_once(network, (1, 1)), 1, network.image_size, network.image_size, device=device)
    candidates: list[Precision] = ["fp32", "bf16"] if device.type == "cpu" else ["fp32", "bf16", "fp16"]
    seconds = {candidate: _seconds(network, images, candidate) for candidate in candidates}
    best = min(candidates, key=lambda candidate: seconds[candidate])
    return best if seconds[best] * WORTH < seconds["fp32"] else "fp32"


@torch.inference_mode()
def _seconds(network: Sam, images: Tensor, precision: Precision) -> float:
    """The shorter of two passes after a first one; infinite where the device lacks the precision."""
    times = []
    try:
        for _ in range(3):
            began = time.perf_counter()
            _logits(network, images, precision).sum().item()
            times.append(time.perf_counter() - began)
    except (RuntimeError, NotImplementedError, TypeError):
        return float("inf")
    return min(times[1:])


def _logits(network: Sam, images: Tensor, precision: Precision) -> Tensor:
    half = HALF.get(precision)
    with torch.autocast(images.device.type, half or torch.bfloat16, enabled=half is not None):
        embedding = network.embed(images.expand(-1, 3, -1, -1))
    return network.logits(embedding.float())


def _turns(flips: str, axis: int) -> Turns:
    """Every combination of the axes that lie in slices perpendicular to a canonical axis, beginning with none."""
    inside = [other for other in MIRRORED.values() if other != axis]
    chosen = [place - 2 for place, other in enumerate(inside) if other in {MIRRORED[name] for name in flips}]
    return [turn for count in range(len(chosen) + 1) for turn in combinations(chosen, count)]


def _largest(probabilities: Tensor) -> NDArray[np.uint8]:
    """The class of the largest probability (slices, height, width), of equal ones the first."""
    # A class after the other: argmax along an axis that is not the last takes ten times as long on a CPU.
    best, labels = probabilities[:, 0], torch.zeros_like(probabilities[:, 0], dtype=torch.uint8)
    for value, of_class in enumerate(probabilities.unbind(1)):
        labels.masked_fill_(of_class > best, value)
        best = torch.maximum(best, of_class)
    return labels.cpu().numpy()


def _in_slices(array: NDArray, affine: NDArray[np.float64], axis: int) -> NDArray:
    """A view (slices, height, width, …) of an array in the volume's axes, to be written to."""
    return np.moveaxis(Volume(array, affine).to_canonical().array, axis, 0)
