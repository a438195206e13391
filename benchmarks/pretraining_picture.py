"""A picture of what the pretrained network sees on held-out synthetic scenes.

    python benchmarks/pretraining_picture.py [WEIGHTS.safetensors] [PICTURE.png]

Rows are scenes; each mask and field has its truth at the left and the prediction at the right. Without arguments: the
weights that are shipped, and ``benchmarks/results/pretraining.png``.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch
from safetensors import safe_open

from flapsam.experiments.pretraining import Recipe, Sampled, held_out
from flapsam.experiments.synthesis import MASKS, TASKS
from flapsam.sam import architecture, build, load_weights, read_checkpoint
from flapsam.sam.checkpoints import SHIPPED

SCENES = 8


def main(weights: Path, picture: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
    network = build(architecture(recipe.backbone), image_size=recipe.size, classes=len(TASKS) - 1)
    load_weights(network, read_checkpoint(weights), str(weights), keep_masks=True)
    last = Sampled.put_into(network)
    scenes = held_out(recipe, 0)
    last.corner = scenes.corner
    with torch.inference_mode():
        outputs = network.eval()(scenes.images)
    truth = torch.cat([scenes.masks, scenes.fields], dim=1)
    shown = outputs.clone()
    shown[:, : len(MASKS)] = (outputs[:, : len(MASKS)] > 0).float()
    columns = 1 + 2 * len(TASKS)
    figure, axes = plt.subplots(SCENES, columns, figsize=(0.8 * columns, 0.8 * SCENES + 0.4), squeeze=False)
    for row in range(SCENES):
        axes[row, 0].imshow(scenes.images[row, 1], cmap="gray")
        for index, task in enumerate(TASKS):
            colours = "viridis" if task in MASKS else "gray"
            low, high = truth[row, index].min(), truth[row, index].max()
            for side, picture_of in enumerate((truth, shown)):
                axes[row, 1 + 2 * index + side].imshow(picture_of[row, index], cmap=colours, vmin=low, vmax=high)
            axes[0, 1 + 2 * index].set_title(task, fontsize=6, loc="left")
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    defaults = [SHIPPED / "sam-tiny.safetensors", Path(__file__).parent / "results" / "pretraining.png"]
    main(*(arguments + defaults[len(arguments) :]))
