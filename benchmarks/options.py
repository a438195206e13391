r"""Effect of the options and of lower precisions of ``flapsam predict`` on time and Dice, on the hippocampus.

    flapsam simulate examples/hippocampus.yaml --set data.path=DATA --set output=RUN --set rounds.count=12 \
        --set backbone.name=sam-tiny-1
    python benchmarks/options.py DATA --run RUN [--threads 2]

DATA is the Medical Segmentation Decathlon's hippocampus with one folder per site. The run's adapter segments the test cases
without options, which is the reference, and with each option. An option's Dice is the mean over classes and cases. Its
difference is paired by case, with a 95 % interval (t) over cases. Seconds are those of all cases, without reading and
writing. Rows that are missing in ``results/options.json`` for the run's augmentation are computed until the minutes are
over.
``int8`` is PyTorch's dynamic quantisation of the encoder's linear layers. flapsam does not offer it, and this row shows why.
"""

import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from cells import HERE, Cells, arguments, read_cells, write_cells
from scipy.stats import t as student

from flapsam.adapters.images import images_of_split
from flapsam.adapters.model import Model, load
from flapsam.adapters.trained import find_trained
from flapsam.base.device import set_up_torch
from flapsam.learning.inference import PredictionOptions
from flapsam.learning.metrics import score_case
from flapsam.sites import label_map
from flapsam.volumes import read_image, read_label

RESULTS = HERE / "results" / "options.json"
REFERENCE = "none"
ROWS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "--flips x": {"flips": "x"},
    "--flips y": {"flips": "y"},
    "--flips xy": {"flips": "xy"},
    "--planes": {"planes": True},
    "--largest": {"largest": True},
    "--fill": {"fill": True},
    "--largest --fill": {"largest": True, "fill": True},
    "--probabilities": {"probabilities": True},
    "--precision bf16": {},
    "int8": {},
}


def model_for(row: str, run: Path) -> Model:
    """The model in the precision of the row."""
    model = load(run, precision="bf16" if "bf16" in row else "fp32")
    if row == "int8":
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.network.vision_encoder = quantize_dynamic(model.network.vision_encoder, {torch.nn.Linear}, torch.qint8)
    return model


def compute(row: str, run: Path, data: Path) -> dict[str, Any]:
    """Segment the test cases with the options of the row. Returns Dice by case and class, and seconds."""
    trained, model = find_trained(run), model_for(row, run)
    if trained.run is None:
        raise SystemExit(f"{run}: not a run's folder; pass the folder of a finished run")
    dice: dict[str, dict[str, float | None]] = {}
    seconds = 0.0
    for job in images_of_split(data, trained, "test"):
        mapping = label_map(trained.run.data, job.site)
        assert isinstance(job.image, Path)
        volume = read_image(job.image)
        truth_path = job.image.parent.parent / "labels" / job.image.name
        truth = mapping.apply(read_label(truth_path).array, truth_path)
        began = time.perf_counter()
        labels = model.segment(volume, PredictionOptions(**ROWS[row])).labels
        seconds += time.perf_counter() - began
        name = job.stem.as_posix()
        dice[name] = dict(score_case(name, job.site, labels, truth, None, mapping.classes, mapping.annotated).dice)
    return {"seconds": round(seconds, 1), "dice": dice}


def means(cell: dict[str, Any]) -> dict[str, float]:
    """Case → mean Dice over its classes."""
    return {case: mean(value for value in dice.values() if value is not None) for case, dice in cell["dice"].items()}


def key(augment: str, row: str) -> str:
    """Name of a cell."""
    return f"{augment}, {row}"


def table(cells: Cells, augment: str) -> str:
    """The rows of runs with the augmentation ``augment``, as Markdown."""
    lines = [
        "| option | seconds | × the time | Dice | difference per case | 95 % interval | better, worse |",
        "|---|" + "---:|" * 6,
    ]
    reference = cells.get(key(augment, REFERENCE))
    for row in ROWS:
        cell = cells.get(key(augment, row))
        if cell is None or reference is None:
            lines.append(f"| {row} |" + " missing |" * 6)
            continue
        ours, theirs = means(cell), means(reference)
        differences = np.array([ours[case] - theirs[case] for case in ours])
        reach = student.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
        centre = differences.mean()
        lines.append(
            f"| {row} | {cell['seconds']} | {cell['seconds'] / reference['seconds']:.2f} | {mean(ours.values()):.4f} | "
            f"{centre:+.4f} | {centre - reach:+.4f} … {centre + reach:+.4f} | "
            f"{(differences > 0).sum()}, {(differences < 0).sum()} of {len(differences)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    set_up_torch(given.threads, deterministic=True)
    end = time.monotonic() + 60 * given.minutes
    run = find_trained(given.run).run
    augment = run.training.augment if run else "unknown"
    for row in ROWS:
        if key(augment, row) not in read_cells(RESULTS) and time.monotonic() < end:
            write_cells(RESULTS, read_cells(RESULTS) | {key(augment, row): compute(row, given.run, given.data)})
    print(f"training.augment: {augment}\n\n{table(read_cells(RESULTS), augment)}")


if __name__ == "__main__":
    main()
