"""What each measure of preset ``fast`` gives, alone and together, for the same number of slices through the network.

    python benchmarks/measures.py DATA [--minutes 30]

DATA is the Medical Segmentation Decathlon's hippocampus as one folder a site. A cell trains ``flap`` on the pooled cases of
two sites, on one thread, for about as many slices as one epoch of the paper has (every slice five times), and scores the
validation cases of all sites. Rows come from ``paper`` with one measure added, and from ``fast`` with one taken back.
Differences are paired by case. What is missing in ``results/measures.json`` is computed until the minutes are over.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flapsam.config import read_config
from flapsam.device import set_up_torch
from flapsam.files import write_text
from flapsam.inference import predict_stack
from flapsam.metrics import score_case
from flapsam.presets import PRESETS
from flapsam.sam import assemble
from flapsam.sites import hold_out_validation, label_map, read_sites
from flapsam.slices import PreparedCase, prepare
from flapsam.training import Learner, batches_per_epoch, fit

HERE = Path(__file__).parent
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
"""What it is called → the fields that it sets."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast, no augmentation": ("fast", {"training.augment": "none"}),
    "fast, bf16": ("fast", {"precision": "bf16"}),
}
"""Further rows: a preset and what is changed in it."""


def values_of(preset: str) -> dict[str, Any]:
    """Field → value, for the fields of the measures."""
    config = read_config_of([f"preset={preset}"]).model_dump()
    fields = [field for measure in MEASURES.values() for field in measure]
    return {field: config[field.split(".")[0]][field.split(".")[1]] for field in fields}


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Row → the preset that it is compared with, and what is changed in it."""
    paper, fast = values_of("paper"), values_of("fast")
    table: dict[str, tuple[str, dict[str, Any]]] = {preset: (preset, {}) for preset in PRESETS} | OTHERS
    table |= {f"paper + {name}": ("paper", {f: fast[f] for f in fields}) for name, fields in MEASURES.items()}
    table |= {f"fast − {name}": ("fast", {f: paper[f] for f in fields}) for name, fields in MEASURES.items()}
    return table


def read_config_of(values: list[str], data: Path = Path()) -> Any:
    """The run's configuration with these values set."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(f"data: {{path: {json.dumps(str(data.resolve()))}, labels: {{anterior: 1, posterior: 2}}}}\n")
        return read_config(path, [*values, "lora.rank=16"])


def compute(data: Path, preset: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Dice of every validation case, and what it took."""
    config = read_config_of([f"preset={preset}", *(f"{f}={json.dumps(v)}" for f, v in changes.items())], data)
    set_up_torch(1, deterministic=True)
    train: list[PreparedCase] = []
    val: list[PreparedCase] = []
    for site in read_sites(config.data, config.seed):
        site = hold_out_validation(site, config.data.validation_fraction, config.seed)
        for part, cases in (("train", train), ("val", val)):
            if part == "val" or site.name in TRAINED_ON:
                labels = label_map(config.data, site.name)
                cases += [
                    prepare(case, labels, config.samples, folder / site.name) for case in site.cases if case.split == part
                ]
    network = assemble(
        config.backbone, image_size=None, classes=2, strategy_name="flap", rank=config.lora.rank, seed=config.seed
    ).network
    options = config.training
    wanted = 5 * sum(case.slices for case in train)
    shown = batches_per_epoch(train, options) * options.batch_size * options.window
    options = options.model_copy(update={"epochs": max(round(wanted / shown), 1)})
    report = fit(network, Learner(network, options), train, config.samples, seed=config.seed, precision=config.precision)
    dice = {}
    for case in val:
        found = predict_stack(network, case.stack(config.samples), batch=config.inference_batch)
        score = score_case(case.name, case.site, found, case.labels(), None, config.data.classes)
        dice[case.name] = mean(value or 0.0 for value in score.dice.values())
    return {"slices": report.slices, "steps": report.steps, "seconds": round(report.seconds), "dice": dice}


def table(cells: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | slices | steps | seconds | Dice | difference |", "|---|" + "---:|" * 5]
    for row, (base, _) in rows().items():
        cell, other = cells.get(row), cells.get(base)
        if cell is None:
            lines.append(f"| {row} |" + " missing |" * 5)
            continue
        difference = ""
        if other and row != base:
            each = [cell["dice"][case] - other["dice"][case] for case in cell["dice"]]
            difference = f"{mean(each):+.3f} ± {stdev(each) / len(each) ** 0.5:.3f}"
        numbers = " | ".join(str(cell[key]) for key in ("slices", "steps", "seconds"))
        lines.append(f"| {row} | {numbers} | {mean(cell['dice'].values()):.3f} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="no cell is begun after these")
    arguments = parser.parse_args()
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        for row, (preset, changes) in rows().items():
            if row not in cells and time.monotonic() < end:
                cells[row] = compute(arguments.data, preset, changes, Path(folder))
                write_text(RESULTS, json.dumps(cells, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
