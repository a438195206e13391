"""Dice of a U-Net on the demo's phantom without federation, as a reference for the demo's Dice.

    python benchmarks/phantom_unet.py FOLDER [--minutes 30]

MONAI's ``BasicUNet`` (1.2 million parameters, random weights, all of them trained) learns from the pooled training cases
with the samples, augmentation, loss and optimizer of ``flapsam demo``. It sees every slice, and trains for about as many
steps as the demo and for more. Cells that are missing in ``results/phantom_unet.json`` are computed on one thread until the
minutes are over.
"""

import tempfile
import time
from pathlib import Path
from typing import cast

import torch
from cells import HERE, arguments, prepared, read_cells, write_cells
from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor, nn

from flapsam.base.device import set_up_torch
from flapsam.experiments.demo import DESCRIPTION
from flapsam.federation.client import score_cases
from flapsam.learning.metrics import summarise
from flapsam.learning.training import Learner, fit
from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config
from flapsam.sam import Sam

RESULTS = HERE / "results" / "phantom_unet.json"
EPOCHS = (12, 24)


class UNet(nn.Module):
    """A U-Net with the interface of flapsam's own network."""

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.layers = BasicUNet(2, 3, classes + 1, features=(16, 32, 64, 128, 128, 16))
        self.pixel_mean: Tensor
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 0.5))

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, size, size) in [0, 1] → logits (batch, classes + 1, size, size)."""
        return self.layers(images - self.pixel_mean)


def compute(config: RunConfig, epochs: int) -> dict[str, object]:
    """Train and test a U-Net. Returns its steps, its seconds of training, and its mean test Dice by class."""
    set_up_torch(1, deterministic=True)
    size = config.samples.size
    if size is None:
        raise ValueError(f"{DESCRIPTION}: samples.size is missing; set it")
    torch.manual_seed(config.seed)
    network = cast(Sam, UNet(len(config.data.classes), size))
    options = config.training.model_copy(update={"epochs": epochs, "schedule_epochs": epochs})
    with tempfile.TemporaryDirectory() as folder:
        train, test = (prepared(config, Path(folder), split) for split in ("train", "test"))
        began = time.perf_counter()
        report = fit(network, Learner(network, options), train, config.samples, seed=config.seed)
        seconds = time.perf_counter() - began
        summary = summarise(score_cases(network, test, config))
    return {"steps": report.steps, "seconds": round(seconds), "dice": {**summary.dice, "mean": summary.mean_dice}}


def main() -> None:
    given = arguments(__doc__).parse_args()
    values = [f"data.path={given.data.resolve()}", "training.empty_slices=1", "samples.size=160"]
    config = read_config(DESCRIPTION, values)
    cells = read_cells(RESULTS)
    end = time.monotonic() + 60 * given.minutes
    for epochs in EPOCHS:
        if str(epochs) not in cells and time.monotonic() < end:
            cells[str(epochs)] = compute(config, epochs)
            write_cells(RESULTS, cells)
    print("| epochs | steps | kidney | tumour | mean | seconds, one thread |\n|---:|---:|---:|---:|---:|---:|")
    for epochs in EPOCHS:
        cell = cells.get(str(epochs))
        dice = [f"{cell['dice'][name]:.3f}" for name in ("kidney", "tumour", "mean")] if cell else ["missing"] * 3
        rest = (str(cell["steps"]), str(cell["seconds"])) if cell else ("missing", "missing")
        print(f"| {epochs} | {rest[0]} | {' | '.join(dice)} | {rest[1]} |")


if __name__ == "__main__":
    main()
