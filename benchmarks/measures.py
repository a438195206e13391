"""Effect of each measure of preset ``fast``, alone and together, at the same number of slices through the network.

    python benchmarks/measures.py DATA [--minutes 30]

DATA is the Medical Segmentation Decathlon's hippocampus with one folder per site. A cell trains ``flap`` on the pooled cases
of two sites, on one thread, for about as many slices as one epoch of the paper has (every slice five times), and scores the
validation cases of all sites. Rows are ``paper`` with one measure added, and ``fast`` with one measure removed. Differences
are paired by case. Cells that are missing in ``results/measures.json`` are computed until the minutes are over.
"""

import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from cells import HERE, Cells, arguments, hippocampus, paired, prepared, read_cells, write_cells

from flapsam.base.device import set_up_torch
from flapsam.federation.client import score_cases
from flapsam.learning.training import Learner, batches_per_epoch, fit
from flapsam.run.presets import PRESETS
from flapsam.sam import assemble_run

RESULTS = HERE / "results" / "measures.json"
TRAINED_ON = ("site_1", "site_2")
MEASURES: dict[str, tuple[str, ...]] = {
    "each slice once an epoch, 12 a batch": ("training.window", "training.batch_size"),
    "adjacent slices in the channels": ("samples.channels",),
    "masks start from the checkpoint's": ("backbone.masks",),
    "a quarter of the empty slices": ("training.empty_slices",),
    "gentle augmentation": ("training.augment",),
    "learning rate, warm-up, schedule": (
        "training.learning_rate",
        "training.warmup_steps",
        "training.schedule_epochs",
        "training.schedule_power",
    ),
    "foreground weight 10": ("training.foreground_weight",),
}
"""Name of a measure → the fields that it sets."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast, no augmentation": ("fast", {"training.augment": "none"}),
    "fast, bf16": ("fast", {"precision": "bf16"}),
}
"""Further rows → their preset, and the fields changed in it."""


def values_of(preset: str) -> dict[str, Any]:
    """Field → the preset's value, for the fields of the measures."""
    config = hippocampus(Path(), {"preset": preset}).model_dump()
    fields = [field for measure in MEASURES.values() for field in measure]
    return {field: config[field.split(".")[0]][field.split(".")[1]] for field in fields}


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Row → the preset that it is compared with, and the fields changed in it."""
    paper, fast = values_of("paper"), values_of("fast")
    table: dict[str, tuple[str, dict[str, Any]]] = {preset: (preset, {}) for preset in PRESETS} | OTHERS
    table |= {f"paper + {name}": ("paper", {f: fast[f] for f in fields}) for name, fields in MEASURES.items()}
    table |= {f"fast − {name}": ("fast", {f: paper[f] for f in fields}) for name, fields in MEASURES.items()}
    return table


def compute(data: Path, preset: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one cell. Returns its slices, steps and seconds, and the Dice of every validation case."""
    config = hippocampus(data, {"preset": preset, **changes})
    set_up_torch(1, deterministic=True)
    train, val = prepared(config, folder, "train", TRAINED_ON), prepared(config, folder, "val")
    network = assemble_run(config).network
    options = config.training
    wanted = 5 * sum(case.slices for case in train)
    shown = batches_per_epoch(train, options) * options.batch_size * options.window
    options = options.model_copy(update={"epochs": max(round(wanted / shown), 1)})
    report = fit(network, Learner(network, options), train, config.samples, seed=config.seed, precision=config.precision)
    scores = score_cases(network, val, config.model_copy(update={"precision": "fp32"}))
    dice = {score.case: mean(value or 0.0 for value in score.dice.values()) for score in scores}
    return {"slices": report.slices, "steps": report.steps, "seconds": round(report.seconds), "dice": dice}


def table(cells: Cells) -> str:
    """The rows as Markdown."""
    lines = ["| | slices | steps | seconds | Dice | difference |", "|---|" + "---:|" * 5]
    for row, (base, _) in rows().items():
        cell, reference = cells.get(row), cells.get(base)
        if cell is None:
            lines.append(f"| {row} |" + " missing |" * 5)
            continue
        difference = paired(cell["dice"], reference["dice"])[0] if reference and row != base else ""
        numbers = " | ".join(str(cell[key]) for key in ("slices", "steps", "seconds"))
        lines.append(f"| {row} | {numbers} | {mean(cell['dice'].values()):.3f} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    cells = read_cells(RESULTS)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        for row, (preset, changes) in rows().items():
            if row not in cells and time.monotonic() < end:
                cells[row] = compute(given.data, preset, changes, Path(folder))
                write_cells(RESULTS, cells)
    print(table(cells))


if __name__ == "__main__":
    main()
