"""Many sites on one machine: time, memory and ledger of a simulation with two workers, at 20 and at 200 sites.

    python benchmarks/many_sites.py [--sites 20 200 2000]

Every site has four cases: phantoms, or above 200 sites images of 20 × 16 × 6 voxels at 32 pixels, so that fits are short.
The run uses `sam-tiny-1`, preset `fast`, two rounds, two workers and one thread each.
Every number of sites runs in a fresh process. Ten times a second, the resident memory of all its processes is read. The
largest sum is recorded, and the largest value of the server and of a worker (pages that processes share count in each).
`results/many_sites.json` keeps the figures, and `results/many_sites.md` is rewritten.
"""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import yaml
from cells import by_sites, write_case

from flapsam.experiments.phantom import make_phantom
from flapsam.run.ledger import Fitted, RoundClosed, read_ledger

ROUNDS, WORKERS, CASES = 2, 2, 4
MOST_PHANTOMS = 200
"""Largest number of sites that have phantoms."""
TINY = (20, 16, 6)
"""Voxels of an image where there are more sites."""


def make_tiny(folder: Path, sites: int) -> None:
    """Write sites whose images are noise with a bright box, and another box within it."""
    rng = np.random.default_rng(0)
    for number in range(sites):
        for case in range(CASES):
            label = np.zeros(TINY, np.uint8)
            x, y = rng.integers(1, 8, 2)
            label[x : x + 10, y : y + 7, 1:5] = 1
            label[x + 3 : x + 6, y + 2 : y + 5, 2:4] = 2
            image = 100 * label + rng.normal(0, 20, TINY)
            write_case(folder / f"site_{number:04}", f"case_{case}", image, label)


def measure(sites: int, folder: Path) -> dict:
    """Run a simulation, and return its figures."""
    if sites <= MOST_PHANTOMS:
        make_phantom(folder / "sites", sites=sites, cases=CASES, seed=0, on_case=lambda: None)
    else:
        make_tiny(folder / "sites", sites)
    tree = {
        "data": {"path": str(folder / "sites"), "labels": {"kidney": 1, "tumour": 2}},
        "backbone": {"name": "sam-tiny-1"},
        "rounds": {"count": ROUNDS},
        "samples": {} if sites <= MOST_PHANTOMS else {"size": 32},
        "threads": 1,
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-c", "from flapsam import cli; cli.main()", "simulate", str(folder / "run.yaml")]
    started = time.perf_counter()
    process = psutil.Popen([*command, "--workers", str(WORKERS), "--json"], stdout=subprocess.DEVNULL)
    together, server, worker = 0, 0, 0
    while process.poll() is None:
        try:
            own = process.memory_info().rss
            others = [child.memory_info().rss for child in process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        together, server, worker = max(together, own + sum(others)), max(server, own), max(worker, *others, 0)
        time.sleep(0.1)
    assert process.returncode == 0
    events = read_ledger(folder / "run/events.jsonl")
    fits = [event for event in events if isinstance(event, Fitted)]
    rounds = [event for event in events if isinstance(event, RoundClosed)]
    return {
        "sites": sites,
        "seconds": time.perf_counter() - started,
        "round_seconds": [event.seconds for event in rounds],
        "aggregation_seconds": [event.aggregation_seconds for event in rounds],
        "fit_seconds": sum(event.seconds or 0 for event in fits),
        "other_seconds": [
            event.seconds - sum(fit.seconds or 0 for fit in fits if fit.round == event.round) / WORKERS for event in rounds
        ],
        "mib": {"together": together >> 20, "server": server >> 20, "worker": worker >> 20},
        "kib_up": sum(event.bytes_up for event in fits) / len(fits) / 1024,
        "ledger": {"bytes": (folder / "run/events.jsonl").stat().st_size, **Counter(event.event for event in events)},
    }


def table(rows: list[dict]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Many sites on one machine",
        "",
        f"Measured by `benchmarks/many_sites.py` on two cores: {CASES} cases per site, `sam-tiny-1`, preset `fast`,",
        f"{ROUNDS} rounds, {WORKERS} workers with one thread each. Up to {MOST_PHANTOMS} sites have phantoms, more",
        "have tiny images at 32 pixels. MiB are peaks of resident memory. Rounds include aggregation.",
        "",
        "| sites | whole run, s | rounds, s | aggregation, s | rounds without fits, s | all processes, MiB "
        "| server, MiB | worker, MiB | KiB up per fit | ledger, KiB | fits in the ledger | refused |",
        "|---:" * 12 + "|",
    ]
    for row in rows:
        mib, ledger = row["mib"], row["ledger"]
        lines.append(
            f"| {row['sites']} | {row['seconds']:.0f} | {', '.join(f'{s:.0f}' for s in row['round_seconds'])} "
            f"| {', '.join(f'{s:.1f}' for s in row['aggregation_seconds'])} | {_others(row)} | {mib['together']} "
            f"| {mib['server']} | {mib['worker']} | {row['kib_up']:.0f} | {ledger['bytes'] / 1024:.0f} | {ledger['fit']} "
            f"| {ledger.get('refused', 0)} |"
        )
    return "\n".join(lines) + "\n"


def _others(row: dict) -> str:
    """Seconds of each round beyond those of its fits, which two workers share. Earlier rows did not measure it."""
    return ", ".join(f"{seconds:.1f}" for seconds in row["other_seconds"]) if "other_seconds" in row else "–"


if __name__ == "__main__":
    by_sites(__doc__, "many_sites", [20, 200], measure, table)
