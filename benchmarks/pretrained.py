"""Effect of pretraining: FLAP-SAM on the shipped sam-tiny-1 against random weights, on the hippocampus at six sites.

    python benchmarks/pretrained.py DATA [--minutes 30]

DATA is the Medical Segmentation Decathlon's hippocampus with one folder per site. Each cell is one run of
``examples/hippocampus.yaml`` with the weights, seed and rounds of its row and with ``OPTIONS``. Cells that are missing in
``results/pretrained.json``, or that belong to other weights than those that ship now, are computed until the minutes are
over, the most informative ones first. Then the table is printed. The runs of a pair have the same seed, cases, rounds and
steps. The difference is the mean over the test cases of the difference between the two runs' mean Dice.
"""

import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from statistics import mean

from cells import HERE, Cells, arguments, paired, read_cells, write_cells

from flapsam.experiments.simulation import simulate
from flapsam.run.reading import read_config
from flapsam.sam.checkpoints import SHIPPED

RESULTS = HERE / "results" / "pretrained.json"
WEIGHTS = ("shipped", "random")
CELLS = [(8, 0), (6, 0), (6, 1), (6, 2), (20, 0), (8, 1), (8, 2)]
"""Rounds and seed, the most informative first."""
OPTIONS = {"backbone.name": "sam-tiny-1", "backbone.masks": "new", "training.empty_slices": 1, "training.augment": "none"}
"""Fields of both runs of a pair. Only the weights differ, and nothing else is taken from the checkpoint."""


def checksum(weights: str) -> str:
    """First digits of the SHA-256 of the shipped weights, or ``random``."""
    if weights == "random":
        return weights
    return hashlib.sha256((SHIPPED / "sam-tiny-1.safetensors").read_bytes()).hexdigest()[:12]


def cells_of_today() -> Cells:
    """The cells so far that belong to the current weights."""
    current = {checksum(weights) for weights in WEIGHTS}
    return {name: cell for name, cell in read_cells(RESULTS).items() if cell["weights"] in current}


def compute(data: Path, rounds: int, seed: int, weights: str) -> dict[str, object]:
    """Run one cell. Returns its seconds, the checksum of its weights, and the Dice of every test case and class."""
    folder = Path(tempfile.mkdtemp())
    values = {
        **OPTIONS,
        "data.path": data.resolve(),
        "output": folder / "run",
        "seed": seed,
        "rounds.count": rounds,
        "rounds.validate_every": rounds,
        "training.schedule_epochs": rounds,
        "backbone.weights": "null" if weights == "shipped" else weights,
    }
    config = read_config(HERE.parent / "examples" / "hippocampus.yaml", [f"{k}={v}" for k, v in values.items()])
    began = time.perf_counter()
    results = simulate(config)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    dice = {score.case: score.dice for score in results.scores["federated"]}
    return {"seconds": round(seconds), "weights": checksum(weights), "dice": dice}


def key(rounds: int, seed: int, weights: str) -> str:
    return f"{rounds} rounds, seed {seed}, {weights}"


def table(cells: Cells) -> str:
    head = ["rounds", "seed", "shipped", "random", "difference", "cases better", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---:" * len(head) + "|"]
    for rounds, seed in sorted(CELLS):
        pair = [cells.get(key(rounds, seed, weights)) for weights in WEIGHTS]
        dice = [{case: mean(values.values()) for case, values in cell["dice"].items()} if cell else None for cell in pair]
        row = [str(rounds), str(seed), *(f"{mean(d.values()):.3f}" if d else "missing" for d in dice)]
        first, second = dice
        if first and second:
            difference, better = paired(first, second)
            row += [difference, f"{better} of {len(first)}"]
        else:
            row += ["missing", "missing"]
        row.append(", ".join(str(cell["seconds"]) if cell else "missing" for cell in pair))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    cells = cells_of_today()
    end = time.monotonic() + 60 * given.minutes
    for rounds, seed in CELLS:
        for weights in WEIGHTS:
            name = key(rounds, seed, weights)
            if name not in cells and time.monotonic() < end:
                cells[name] = compute(given.data, rounds, seed, weights)
                write_cells(RESULTS, cells)
                print(f"{name}: {cells[name]['seconds']} s", flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
