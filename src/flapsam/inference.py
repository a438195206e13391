"""Volume → label map: every slice once, in batches, without prompts."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from flapsam.config import Samples
from flapsam.sam import Sam
from flapsam.slices import SliceStack, from_square, stack_of, to_square
from flapsam.volumes import Volume, canonical_slice_axis, from_canonical


@torch.inference_mode()
def predict_stack(
    network: Sam,
    stack: SliceStack,
    *,
    batch: int,
    precision: str = "fp32",
    on_slices: Callable[[int], None] = lambda count: None,
) -> NDArray[np.uint8]:
    """Class indices (slices, height, width) of a stack.

    Probabilities are resized to the slice's own grid before the largest is taken.

    Args:
        network: with the trained parameters.
        stack: the slices.
        batch: slices at once.
        precision: ``bf16`` runs the network under autocast.
        on_slices: called with the number of slices just done.
    """
    network.eval()
    device = network.pixel_mean.device
    resize = stack.samples.resize
    labels = np.empty(stack.shape, np.uint8)
    height, width = stack.shape[1:]
    for start in range(0, len(stack), batch):
        stop = min(start + batch, len(stack))
        images = torch.cat([stack.window(index) for index in range(start, stop)])
        images = to_square(images, network.image_size, resize).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        probabilities = from_square(logits.float().softmax(dim=1), (height, width), resize)
        labels[start:stop] = probabilities.argmax(dim=1).to("cpu", torch.uint8).numpy()
        on_slices(stop - start)
    return labels


def predict_volume(
    network: Sam, volume: Volume, samples: Samples, *, batch: int, precision: str = "fp32", site: str = ""
) -> NDArray[np.uint8]:
    """Class indices in the volume's own axes and shape, whatever its orientation; ``site`` where sites are clipped apart."""
    labels = predict_stack(network, stack_of(volume, samples, site), batch=batch, precision=precision)
    axis = canonical_slice_axis(volume.affine, samples.axis)
    return np.ascontiguousarray(from_canonical(np.moveaxis(labels, 0, axis), volume.affine))
