"""Image embeddings of a frozen encoder, computed once per slice and kept beside the unpacked case."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flapsam.base.files import written_whole
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.slices import SliceStack, to_square
from flapsam.run.config import Samples, Training
from flapsam.sam import Sam
from flapsam.sam.lora import frozen_checksum

BATCH = 16
"""Number of slices that pass through the encoder at once."""


def can_be_kept(network: Sam, options: Training, samples: Samples) -> bool:
    """Whether a slice has the same embedding in every epoch.

    It does not where the encoder trains or augmentation changes the slices. It also differs where a slice is part of several
    windows and every window has its own scaling.
    """
    same_input = options.augment == "none" and (options.window == 1 or samples.scaling == "volume")
    return same_input and not any(parameter.requires_grad for parameter in network.vision_encoder.parameters())


class Features:
    """Embeddings of all slices of a site's cases, kept on disk."""

    def __init__(self, network: Sam, cases: Sequence[PreparedCase], samples: Samples, precision: str) -> None:
        """Compute the embeddings that are missing.

        Args:
            network: the network, whose encoder is frozen.
            cases: the cases to embed.
            samples: how volumes become samples.
            precision: ``bf16`` runs the encoder under autocast.
        """
        made_by = f"{frozen_checksum(network)} {samples.model_dump_json()} {network.image_size} {precision}"
        self.key = hashlib.sha256(made_by.encode()).hexdigest()[:16]
        for case in cases:
            path = self._path(case)
            if not path.exists():
                with written_whole(path) as temporary, temporary.open("wb") as file:
                    np.save(file, _embeddings(network, case.stack(samples), precision))

    def of(self, case: PreparedCase) -> NDArray[np.float32]:
        """Embeddings of a case (slices, channels, tokens, tokens), mapped from disk."""
        return np.load(self._path(case), mmap_mode="r")

    def _path(self, case: PreparedCase) -> Path:
        return case.folder / f"{case.name}.{self.key}.npy"


@torch.inference_mode()
def _embeddings(network: Sam, stack: SliceStack, precision: str) -> NDArray[np.float32]:
    device = network.pixel_mean.device
    embeddings = []
    for start in range(0, len(stack), BATCH):
        images = torch.cat([stack.window(index) for index in range(start, min(start + BATCH, len(stack)))])
        images = to_square(images, network.image_size, stack.samples.resize).to(device).expand(-1, 3, -1, -1)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            embeddings.append(network.embed(images).float().cpu().numpy())
    return np.concatenate(embeddings)
