"""What a U-Net gets on the demo's phantom when nothing is federated: a mark to judge the demo's Dice by.

    python benchmarks/phantom_unet.py FOLDER [--minutes 30]

MONAI's ``BasicUNet`` (1.2 million parameters, random weights, all of them trained) learns from the pooled training cases
with the samples, augmentation, loss and optimizer of ``examples/demo.yaml``, every slice, for about as many steps as the
demo and for more. What is missing in ``results/phantom_unet.json`` is computed, on one thread, until the minutes are over.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import cast

import torch
from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor, nn

from flapsam.config import RunConfig, read_config
from flapsam.device import set_up_torch
from flapsam.files import write_text
from flapsam.inference import predict_stack
from flapsam.metrics import score_case, summarise
from flapsam.sam import Sam
from flapsam.sites import hold_out_validation, label_map, read_sites
from flapsam.sites.case import Split
from flapsam.slices import PreparedCase, prepare
from flapsam.training import Learner, fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "phantom_unet.json"
EPOCHS = (12, 24)


class UNet(nn.Module):
    """A U-Net where flapsam expects its own network."""

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.layers = BasicUNet(2, 3, classes + 1, features=(16, 32, 64, 128, 128, 16))
        self.pixel_mean: Tensor
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 0.5))

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, size, size) in [0, 1] → logits (batch, classes + 1, size, size)."""
        return self.layers(images - self.pixel_mean)


def prepared(config: RunConfig, folder: Path) -> dict[Split, list[PreparedCase]]:
    """The cases of all sites by split."""
    parts: dict[Split, list[PreparedCase]] = {"train": [], "test": []}
    for site in read_sites(config.data, config.seed):
        site = hold_out_validation(site, config.data.validation_fraction, config.seed)
        labels = label_map(config.data, site.name)
        for split, cases in parts.items():
            cases += [prepare(case, labels, config.samples, folder / site.name) for case in site.of(split)]
    return parts


def compute(config: RunConfig, epochs: int) -> dict[str, object]:
    """Mean test Dice by class, and seconds of training."""
    set_up_torch(1, deterministic=True)
    size = config.samples.size
    if size is None:
        raise ValueError("the demo says its size")
    torch.manual_seed(config.seed)
    network = cast(Sam, UNet(len(config.data.classes), size))
    options = config.training.model_copy(update={"epochs": epochs, "schedule_epochs": epochs})
    with tempfile.TemporaryDirectory() as folder:
        parts = prepared(config, Path(folder))
        began = time.perf_counter()
        report = fit(network, Learner(network, options), parts["train"], config.samples, seed=config.seed)
        seconds = time.perf_counter() - began
        scores = [
            score_case(
                case.name,
                case.site,
                predict_stack(network, case.stack(config.samples), batch=config.inference_batch),
                case.labels(),
                None,
                config.data.classes,
            )
            for case in parts["test"]
        ]
    summary = summarise(scores)
    return {"steps": report.steps, "seconds": round(seconds), "dice": {**summary.dice, "mean": summary.mean_dice}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="no cell is begun after these")
    arguments = parser.parse_args()
    values = [f"data.path={arguments.data.resolve()}", "training.empty_slices=1"]
    config = read_config(HERE.parent / "examples" / "demo.yaml", values)
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    end = time.monotonic() + 60 * arguments.minutes
    for epochs in EPOCHS:
        if str(epochs) not in cells and time.monotonic() < end:
            cells[str(epochs)] = compute(config, epochs)
            write_text(RESULTS, json.dumps(cells, indent=1) + "\n")
    print("| epochs | steps | kidney | tumour | mean | seconds, one thread |\n|---:|---:|---:|---:|---:|---:|")
    for epochs in EPOCHS:
        cell = cells.get(str(epochs))
        dice = [f"{cell['dice'][name]:.3f}" for name in ("kidney", "tumour", "mean")] if cell else ["missing"] * 3
        rest = (str(cell["steps"]), str(cell["seconds"])) if cell else ("missing", "missing")
        print(f"| {epochs} | {rest[0]} | {' | '.join(dice)} | {rest[1]} |")


if __name__ == "__main__":
    main()
