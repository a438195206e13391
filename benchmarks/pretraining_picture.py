"""Draw what the pretrained network predicts on held-out synthetic scenes.

    python benchmarks/pretraining_picture.py [WEIGHTS.safetensors] [PICTURE.png]

Each row is a scene. For each task, the truth is on the left and the prediction on the right. Without arguments, the script
uses the shipped weights and writes ``benchmarks/results/pretraining.png``.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch
from safetensors import safe_open

from flapsam.experiments.pretraining import Recipe, held_out
from flapsam.experiments.synthesis import TASKS
from flapsam.sam import architecture, build, infer_architecture, load_checkpoint, read_checkpoint
from flapsam.sam.checkpoints import SHIPPED

SCENES = 8


def main(weights: Path, picture: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
    state = read_checkpoint(weights)
    name = infer_architecture(state)
    assert name is not None
    network = build(architecture(name), image_size=recipe.size, classes=len(TASKS))
    load_checkpoint(network, state, str(weights), keep_masks=True)
    scenes = held_out(recipe, 0)
    with torch.inference_mode():
        outputs = network.eval()(scenes.images)
    columns = 1 + 2 * (len(TASKS) + 1)
    figure, axes = plt.subplots(SCENES, columns, figsize=(columns, SCENES + 0.4), squeeze=False)
    for row in range(SCENES):
        shown = [("image", scenes.images[row, 1], "gray")]
        for index, task in enumerate(TASKS):
            shown.append((task, scenes.masks[row, index], "viridis"))
            shown.append(("", (outputs[row, index] > 0).float(), "viridis"))
        shown += [("levels", scenes.levels[row], "gray"), ("", outputs[row, -1], "gray")]
        for axis, (title, image, colours) in zip(axes[row], shown, strict=True):
            axis.imshow(image, cmap=colours)
            axis.axis("off")
            if row == 0:
                axis.set_title(title, fontsize=6, loc="left")
    figure.tight_layout(pad=0.2)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    defaults = [SHIPPED / "sam-tiny.safetensors", Path(__file__).parent / "results" / "pretraining.png"]
    main(*(arguments + defaults[len(arguments) :]))
