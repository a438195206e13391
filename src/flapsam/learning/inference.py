"""Segment a volume slice by slice, in batches, without prompts.

The next slices are cut and scaled while the network works on the current ones. Only the label map is kept in memory, unless
probabilities are requested or averaged over planes.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flapsam.base.device import beside, lent, sample_device
from flapsam.base.errors import FlapsamError
from flapsam.base.prefetch import ahead
from flapsam.learning.cleaning import fill_holes, keep_largest
from flapsam.learning.confidence import CERTAIN, entropy, expected_dice
from flapsam.learning.cuda_graph import captured_without_gradients
from flapsam.learning.slices import SliceStack, at_once, from_square, stack_of, to_square, windows
from flapsam.run.config import Samples
from flapsam.sam import Sam
from flapsam.volumes import CANONICAL_AXES, Volume, canonical_slice_axis, room

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
HALF: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
OFFERED: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
"""Precisions of a prediction. What a GPU does with float32 is a setting of the process."""
MIRRORED = {"x": 0, "y": 1, "z": 2}
"""Canonical axis of each letter: x runs from left to right, y from back to front, z from foot to head."""
Turns = Sequence[tuple[int, ...]]
"""Dimensions of (…, height, width) to flip, one tuple for each pass through the network."""
BUDGET = 2**30
"""Bytes that the slices in one pass through the network may take, roughly."""
AMPERE = (8, 0)
"""Compute capability of the first GPUs that compute in bfloat16."""
EVERY = slice(None)
Batch = tuple[list[int], Tensor, list[int], slice]
"""Indices of slices, images, which may be of more slices, indices of blank slices, and which of the images are wanted."""

log = logging.getLogger(__name__)


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
    uncertainty: bool = False
    """Return the entropy of every voxel's probabilities, too."""
    confidence: bool = False
    """Return the expected Dice of every class, too."""

    def __post_init__(self) -> None:
        """Raise FlapsamError for an unknown axis."""
        if not set(self.flips) <= MIRRORED.keys():
            raise FlapsamError(
                f"flips '{self.flips}' names an unknown axis; use x (left to right), y (back to front) and z (foot to head)"
            )


@dataclass(frozen=True)
class Prediction:
    """A volume's label map, and what else was requested."""

    labels: NDArray[np.uint8]
    """Class indices (i, j, k), with 0 for background."""
    probabilities: NDArray[np.uint16] | None = None
    """Probabilities (i, j, k, class), where 65535 stands for 1."""
    uncertainty: NDArray[np.uint8] | None = None
    """Entropy (i, j, k) of the probabilities, where 255 stands for equal ones."""
    expected: Sequence[float | None] = ()
    """Expected Dice of each class, from ``expected_dice``."""


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
    if options.planes or options.probabilities or options.uncertainty or options.confidence:
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
    return Prediction(
        labels,
        maps if options.probabilities else None,
        entropy(maps) if maps is not None and options.uncertainty else None,
        expected_dice(labels, maps) if maps is not None and options.confidence else (),
    )


def predict_ensemble(
    networks: Iterable[Sam],
    volume: Volume,
    samples: Samples,
    *,
    batch: int | None = None,
    precision: Precision = "fp32",
    site: str = "",
) -> NDArray[np.uint8]:
    """Segment a volume by the mean of several networks' class probabilities.

    Args:
        networks: the networks, of which only one at a time is used, so that they may share their weights.
        volume: the image.
        samples: how it is cut and scaled.
        batch: number of slices per pass through a network, as in ``predict_volume``.
        precision: precision of the image encoders.
        site: the volume's site.

    Returns:
        Class indices (i, j, k), with 0 for background.

    Raises:
        FlapsamError: there is no room for the probabilities.
    """
    total = None
    for network in networks:
        options = PredictionOptions(probabilities=True)
        maps = predict_volume(network, volume, samples, batch=batch, precision=precision, site=site, options=options)
        assert maps.probabilities is not None
        if total is None:
            total = room("probabilities", maps.probabilities.shape, np.uint32)
            total[:] = 0
        total += maps.probabilities
    if total is None:
        raise FlapsamError("an ensemble needs at least one network")
    return total.argmax(axis=-1).astype(np.uint8)


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
    it. Only the first of these is predicted, and the others take its probabilities. Where half precision gives logits that
    are not finite, these slices and all that follow are predicted in fp32, and the log says so.

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
    passing = _pass_of(network, len(stack), batch, precision)
    batches = _runs(network, stack, batch) if network.reach else _batches(network, stack, batch)
    with closing(ahead(batches)) as batches:
        for indices, images, blanks, halo in batches:
            if indices:
                with torch.inference_mode():
                    squares = images.to(device)
                    logits = [passing(squares.flip(axes), halo) for axes in turns]
                    if precision in HALF and not all(bool(part.isfinite().all()) for part in logits):
                        log.warning("%s overflows in this network, so the rest is predicted in fp32", precision)
                        precision = "fp32"
                        passing = partial(_logits, network, precision=precision)
                        logits = [passing(squares.flip(axes), halo) for axes in turns]
                    turned = [part.softmax(1).flip(axes) for part, axes in zip(logits, turns, strict=True)]
                    probabilities = from_square(torch.stack(turned).mean(0), shape, resize)
                yield indices, probabilities
                if blanks and blank_probabilities is None:
                    blank_probabilities = probabilities[indices.index(blanks[0])]
            repeats = blanks[1:] if blanks and blanks[0] in indices else blanks
            while repeats and blank_probabilities is not None:
                current, repeats = repeats[:batch], repeats[batch:]
                yield current, blank_probabilities.expand(len(current), -1, -1, -1)


@torch.inference_mode()
def embeddings(network: Sam, stack: SliceStack, slices: Sequence[int], *, precision: Precision = "fp32") -> Iterator[Tensor]:
    """Encode single slices, each by itself even where slices meet.

    Args:
        network: the network with its trained parameters.
        stack: the slices.
        slices: indices of the slices to encode.
        precision: precision of the image encoder.

    Yields:
        Embeddings (slices, channels, tokens, tokens) of some slices after another, on the network's device.
    """
    network.eval()
    device, batch = network.pixel_mean.device, slices_at_once(network, stack.shape[1:])
    for start in range(0, len(slices), batch):
        some = slices[start : start + batch]
        images = torch.cat([_squares(network, stack, range(index, index + 1), sample_device(device))[0] for index in some])
        yield _embedded(network, images.to(device), precision, depth=1)


def _runs(network: Sam, stack: SliceStack, batch: int) -> Iterator[Batch]:
    """Yield consecutive slices, with those before and after them that their logits depend on. None counts as blank."""
    reach, count, device = network.reach, len(stack), sample_device(network.pixel_mean.device)
    for start in range(0, count, batch):
        end = min(start + batch, count)
        first, last = max(start - reach, 0), min(end + reach, count)
        with beside(device):
            images = lent(_squares(network, stack, range(first, last), device)[0])
        yield list(range(start, end)), images, [], slice(start - first, end - first)


def _batches(network: Sam, stack: SliceStack, batch: int) -> Iterator[Batch]:
    """Yield the slices to predict, their images, and the slices that are blank.

    Only the first blank slice of the stack is among those to predict.
    """
    device, blank_seen = sample_device(network.pixel_mean.device), False
    for start in range(0, len(stack), batch):
        indices = range(start, min(start + batch, len(stack)))
        with beside(device):
            images, lit = _squares(network, stack, indices, device)
            blanks = [index for index, is_lit in zip(indices, lit, strict=True) if not is_lit]
            left_out = blanks if blank_seen else blanks[1:]
            shown = [index for index in indices if index not in left_out]
            images = lent(images[[index - start for index in shown]] if left_out else images)
        blank_seen |= bool(blanks)
        yield shown, images, blanks, EVERY


def _squares(network: Sam, stack: SliceStack, indices: range, device: torch.device) -> tuple[Tensor, list[bool]]:
    """Images (slices, channels, size, size) on a device, and which of the slices have a value other than 0."""
    most = min(at_once(stack.shape[1:], 1, device), len(indices))
    images, lit = [], []
    for start in range(0, len(indices), most):
        cut = windows([(stack, index) for index in indices[start : start + most]], device=device)[:, 0]
        lit += cut.flatten(1).any(dim=1).tolist()
        images.append(to_square(cut, network.image_size, stack.samples.resize))
    return torch.cat(images), lit


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


def usual_precision(device: torch.device) -> Precision:
    """The precision that suits a device: bf16 on a GPU that computes in it, fp16 on an older one, fp32 elsewhere.

    It follows from the device alone. A measurement could choose otherwise the next time, and label maps would differ.
    """
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= AMPERE else "fp16"


@torch.inference_mode()
def _pass_of(network: Sam, slices: int, batch: int, precision: Precision) -> Callable[[Tensor, slice], Tensor]:
    """The pass of images and of the slice of them that is wanted.

    On a GPU, it is a graph if the network stays as it is and if there are several batches.
    """
    directly = partial(_logits, network, precision=precision)
    if network.pixel_mean.device.type != "cuda" or not network.fused or network.reach or slices < 2 * batch:
        return directly
    replays = _replays.setdefault(network, {})
    # A graph knows the weights by their addresses.
    addresses = hash(tuple(tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())))
    key = (batch, precision, addresses)
    if key not in replays:
        while len(replays) >= MOST_GRAPHS:
            del replays[next(iter(replays))]
        example = network.pixel_mean.new_zeros(batch, 3, network.image_size, network.image_size)
        replays[key] = captured_without_gradients(directly, example)
    replay = replays[key]
    return directly if replay is None else lambda images, _: replay(images)


MOST_GRAPHS = 2
"""Graphs of a network that are kept. Each has memory of its own, and slices of another size may need another one."""
_replays: WeakKeyDictionary[Sam, dict[tuple[int, Precision, int], Callable[[Tensor], Tensor] | None]] = WeakKeyDictionary()
"""Network → number of slices, precision and addresses → the graph of its pass, or None if it cannot be captured."""


def _logits(network: Sam, images: Tensor, wanted: slice = EVERY, *, precision: Precision) -> Tensor:
    return network.logits(_embedded(network, images, precision)[wanted].float())


def _embedded(network: Sam, images: Tensor, precision: Precision, depth: int | None = None) -> Tensor:
    half = HALF.get(precision)
    with torch.autocast(images.device.type, half or torch.bfloat16, enabled=half is not None):
        return network.embed(images.expand(-1, 3, -1, -1), depth)


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
