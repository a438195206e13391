"""Validation Dice over time: preset ``paper`` against preset ``fast``.

    python benchmarks/training.py DATA [--preset paper] [--minutes 30]

DATA is the Medical Segmentation Decathlon's hippocampus with one folder per site. A cell is one federated run of strategy
``flap`` with the backbone that ships with flapsam, on one thread. It has as many rounds as take about 15 minutes of fitting
and aggregating. The time of validation is not counted. Cells with the same seed start from the same weights and split. Cells
that are missing in ``results/training.json`` are computed, one process per cell, until the minutes are over. Then the tables
are printed. Two such commands, one per preset, may run side by side on two cores.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from cells import HERE, Cells, arguments, hippocampus, read_cells, write_cells

from flapsam.experiments.simulation import simulate
from flapsam.run.observer import Observer

RESULTS = HERE / "results" / "training.json"
ROUNDS = {"paper": 4, "fast": 22}
"""Number of rounds that take about 15 minutes. One round of the paper shows every slice five times."""
SEEDS = (0, 1, 2)
SHARES = (0.90, 0.95, 0.99)


class Clock(Observer):
    """Collects the seconds of work at the end of each round, and the sites' validation Dice."""

    def __init__(self) -> None:
        self.seconds = self.fitting = self.waiting = 0.0
        self.steps = 0
        self.ends: dict[int, float] = {}
        self.dice: dict[int, dict[str, float]] = defaultdict(dict)

    def event(self, entry: dict[str, Any]) -> None:
        """Add one entry of the ledger."""
        if entry["event"] == "fit":
            self.seconds += entry["seconds"]
            self.fitting += entry["seconds"]
            self.waiting += entry["waiting"]
            self.steps += int(entry["steps"])
        elif entry["event"] == "round":
            self.seconds += entry["aggregation_seconds"]
            self.ends[entry["round"]] = self.seconds
        elif entry["event"] == "validation":
            self.dice[entry["round"]][entry["site"]] = entry["dice"]["mean"]


def compute(data: Path, preset: str, seed: int) -> dict[str, Any]:
    """Run one cell. Returns its rounds, steps, times and peak memory."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "preset": preset,
            "output": f"{folder}/run",
            "seed": seed,
            "rounds.count": ROUNDS[preset],
            "rounds.validate_every": 1,
            "threads": 1,
        }
        simulate(hippocampus(data, values), observer=clock)
    return {
        "rounds": [{"seconds": round(end, 1), "dice": clock.dice[number]} for number, end in sorted(clock.ends.items())],
        "steps": clock.steps,
        "seconds_a_step": round(clock.fitting / clock.steps, 4),
        "waiting": round(clock.waiting / clock.fitting, 4),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def curve(cell: dict[str, Any], site: str | None = None) -> list[tuple[float, float]]:
    """Seconds and Dice after each round, from (0, 0), of a site or as the mean over the sites."""
    return [(0.0, 0.0)] + [(r["seconds"], r["dice"][site] if site else mean(r["dice"].values())) for r in cell["rounds"]]


def reached(points: list[tuple[float, float]], dice: float) -> float | None:
    """Seconds until a Dice is reached, interpolated linearly between rounds; None if it is never reached."""
    for (t0, d0), (t1, d1) in pairwise(points):
        if d1 >= dice:
            return t0 + (t1 - t0) * (dice - d0) / (d1 - d0)
    return None


def tables(cells: Cells) -> str:
    """The cells, and the ratios of times, as Markdown."""
    lines = [
        "| preset | seed | rounds | steps | seconds | ms per step | waiting | peak MiB | best Dice | last Dice |",
        "|---|" + "---:|" * 9,
    ]
    for seed in SEEDS:
        for preset in ROUNDS:
            cell = cells.get(f"{preset}, seed {seed}")
            if cell is None:
                lines.append(f"| {preset} | {seed} |" + " missing |" * 8)
                continue
            dice = [d for _, d in curve(cell)]
            lines.append(
                f"| {preset} | {seed} | {len(cell['rounds'])} | {cell['steps']} | "
                f"{cell['rounds'][-1]['seconds']:.0f} | {1000 * cell['seconds_a_step']:.0f} | "
                f"{cell['waiting']:.1%} | {cell['peak_mib']} | {max(dice):.3f} | {dice[-1]:.3f} |"
            )
    lines += [
        "",
        "| seed | where | share of paper's best Dice | Dice | paper, s | fast, s | fast / paper |",
        "|---:|---|" + "---:|" * 5,
    ]
    for seed in SEEDS:
        pair = [cells.get(f"{preset}, seed {seed}") for preset in ("paper", "fast")]
        if pair[0] is None or pair[1] is None:
            lines.append(f"| {seed} |" + " missing |" * 6)
            continue
        for where in (None, *sorted(pair[0]["rounds"][0]["dice"])):
            paper, fast = (curve(cell, where) for cell in pair if cell)
            best = max(d for _, d in paper)
            for share in SHARES if where is None else (0.95,):
                times = [reached(points, share * best) for points in (paper, fast)]
                shown = " | ".join("not reached" if t is None else f"{t:.0f}" for t in times)
                ratio = f"{times[1] / times[0]:.2f}" if times[0] and times[1] else "none"
                lines.append(f"| {seed} | {where or 'all sites'} | {share:.0%} | {share * best:.3f} | {shown} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--preset", choices=list(ROUNDS), help="compute only cells of this preset")
    parser.add_argument("--cell", type=int, metavar="SEED", help="compute one cell of --preset, and print only that")
    given = parser.parse_args()
    if given.cell is not None:
        print(json.dumps(compute(given.data, given.preset, given.cell)))
        return
    end = time.monotonic() + 60 * given.minutes
    for seed in SEEDS:
        for preset in [given.preset] if given.preset else ROUNDS:
            name = f"{preset}, seed {seed}"
            if name in read_cells(RESULTS) or time.monotonic() > end:
                continue
            command = [sys.executable, __file__, str(given.data), "--preset", preset, "--cell", str(seed)]
            cell = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            # Read again, because the other preset's command may have written in the meantime.
            write_cells(RESULTS, read_cells(RESULTS) | {name: cell})
    print(tables(read_cells(RESULTS)))


if __name__ == "__main__":
    main()
