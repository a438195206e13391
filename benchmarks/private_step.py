"""Seconds of a training step with differential privacy, as a ratio to a step without, side by side in one process.

    python benchmarks/private_step.py [--threads 2] [--repeats 3]

Both kinds of step train ``flap`` at rank 32 on sam-tiny at 128 pixels with the same number of slices: without privacy as one
batch, with it as a pass for each of eight patients. The fits take turns, and the shortest of the repeats counts. The noise
for the 424,848 parameters is part of the step. Finding out how much noise a run needs takes a few seconds once, and is not.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cells import write_case

from flapsam.base.randomness import SystemRandomness
from flapsam.learning.prepared import prepare
from flapsam.learning.private import fit_privately
from flapsam.learning.training import Learner, fit
from flapsam.run.config import RunConfig
from flapsam.sam import assemble_run
from flapsam.sites import label_map, read_site

PATIENTS, STEPS, SHAPE = 8, 4, (128, 128, 8)
WINDOWS = (1, 2, 4, 8)


def config_of(windows: int) -> RunConfig:
    fields = {
        "data": {"path": "data", "labels": {"box": 1}, "validation_fraction": 0, "test_fraction": 0},
        "samples": {"size": 128, "axis": "axial"},
        "training": {"batch_size": PATIENTS * windows},
        "rounds": {"count": 1, "steps": STEPS, "weights": "uniform"},
        "privacy": {"sampling": 1, "windows": windows},
    }
    return RunConfig.model_validate(fields)


def make_patients(folder: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    label[40:80, 40:80] = 1
    for number in range(PATIENTS):
        write_case(folder / "site", f"case_{number}", 100 * label + rng.normal(0, 10, SHAPE), label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| windows a patient | slices | plain, s | private, s | ratio |\n|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        make_patients(Path(temporary) / "data")
        for windows in WINDOWS:
            config = config_of(windows)
            data = config.data.model_copy(update={"path": Path(temporary) / "data"})
            cases = [
                prepare(case, label_map(data, "site"), config.samples, Path(temporary) / "cache")
                for case in read_site(data, 0, "site").cases
            ]
            network, plain, private = assemble_run(config).network, [], []
            assert config.privacy
            for _ in range(options.repeats):
                learner = Learner(network, config.training, config.rounds)
                plain.append(fit(network, learner, cases, config.samples, seed=0).seconds / STEPS)
                learner = Learner(network, config.training, config.rounds)
                started = time.perf_counter()
                fit_privately(network, learner, cases, config.samples, config.privacy, 1.0, randomness=SystemRandomness())
                private.append((time.perf_counter() - started) / STEPS)
            ratio = min(private) / min(plain)
            print(f"| {windows} | {PATIENTS * windows} | {min(plain):.3f} | {min(private):.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
