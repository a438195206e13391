"""What a frozen image encoder says of a slice, computed once and kept beside the unpacked case."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flapsam.config import Samples, Training
from flapsam.files import written_whole
from flapsam.sam import Sam
from flapsam.sam.adapters import frozen_checksum
from flapsam.slices import PreparedCase, to_square

BATCH = 16
"""Slices that go through the encoder at once."""


def can_be_kept(network: Sam, options: Training, samples: Samples) -> bool:
    """Whether a slice looks the same to the encoder in every epoch and the encoder does not change.

    Augmentation changes slices, and in windows of several slices each is scaled by more than one of them.
    """
    frozen = not any(parameter.requires_grad for parameter in network.vision_encoder.parameters())
    same = options.augment == "none" and (options.window == 1 or samples.scaling == "volume")
    return frozen and same


class Features:
    """The embeddings of all slices of a site's cases, on disk."""

    def __init__(self, network: Sam, samples: Samples, precision: str) -> None:
        self.network = network
        self.samples = samples
        self.precision = precision
        made_by = f"{frozen_checksum(network)} {samples.model_dump_json()} {network.image_size} {precision}"
        self.key = hashlib.sha256(made_by.encode()).hexdigest()[:16]

    def of(self, case: PreparedCase) -> NDArray[np.float32]:
        """Embeddings (slices, decoder width, tokens, tokens) of a case, mapped from disk; computed if they are not there."""
        path = case.folder / f"{case.name}.{self.key}.npy"
        if not path.exists():
            self._compute(case, path)
        return np.load(path, mmap_mode="r")

    @torch.inference_mode()
    def _compute(self, case: PreparedCase, path: Path) -> None:
        network, stack = self.network, case.stack(self.samples)
        device = network.pixel_mean.device
        found = []
        for start in range(0, case.slices, BATCH):
            images = torch.cat([stack.window(index) for index in range(start, min(start + BATCH, case.slices))])
            images = to_square(images, network.image_size, self.samples.resize).to(device).expand(-1, 3, -1, -1)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                found.append(network.embed(images).float().cpu().numpy())
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(found))
