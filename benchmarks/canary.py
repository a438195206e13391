"""A canary among the patients: can somebody who sees a site's update tell whether it was there?

    OMP_NUM_THREADS=1 python benchmarks/canary.py [--trials 200] [--minutes 30] [--only PATTERN]

A site trains one round of eight steps on five made-up patients, with or without a sixth, the canary: an image of pure noise
whose label map is noise, too. The observer knows everything but the site's chance: network, settings, all patients and the
canary. The score of an update is its projection on the canary's clipped gradient at the start, which Adam subtracts wherever
the canary takes part. Scores of updates with the canary are compared with scores of updates without.

A row has the area under the ROC curve, the share of canaries found at 5 % false suspicions with a 95 % interval (Clopper and
Pearson), and the share that (ε, δ) allows at most. The last column is the ε that the attack proves: the largest one that is
too small to be true, with 95 % confidence. The threshold for it is chosen on one half of the trials and judged on the other.
Trials that are missing in ``results/canary.json`` are computed until the minutes are over. Then ``results/canary.md`` is
rewritten.
"""

import argparse
import math
import tempfile
import time
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cells import HERE, read_cells, write_case, write_cells
from scipy import stats

from flapsam.base.files import write_text
from flapsam.base.randomness import SystemRandomness
from flapsam.federation.privacy.accounting import planned
from flapsam.learning.prepared import PreparedCase, prepare
from flapsam.learning.private import clipped, fit_privately
from flapsam.learning.training import Learner, backward, batch_of, fit
from flapsam.run.config import RunConfig
from flapsam.sam import Sam, assemble_run, load_tensors, tensors_of, trained
from flapsam.sites import label_map, read_site

RESULTS, TABLE = HERE / "results" / "canary.json", HERE / "results" / "canary.md"
SHAPE, PATIENTS, STEPS, DELTA = (32, 32, 8), 5, 8, 1e-3
ROWS: dict[str, float | None] = {"no privacy": None, "ε = 100": 100, "ε = 8": 8, "ε = 1": 1}
FALSE = 0.05


def config_of(epsilon: float | None) -> RunConfig:
    fields = {
        "data": {"path": "data", "labels": {"ball": 1}, "validation_fraction": 0, "test_fraction": 0},
        "samples": {"size": 32, "axis": "axial"},
        "lora": {"rank": 4},
        "training": {"batch_size": 10},
        "rounds": {"count": 1, "steps": STEPS, "weights": "uniform"},
        "privacy": {"epsilon": epsilon, "delta": DELTA, "repeats": 0} if epsilon else None,
        "threads": 1,
    }
    return RunConfig.model_validate(fields)


def make_patients(folder: Path) -> None:
    """Five balls on a dark background, and the canary, whose name is last."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    for number in range(PATIENTS + 1):
        centre = rng.uniform(0.35, 0.65, 3) * SHAPE
        label = (
            np.square((grid - centre[:, None, None, None]) / (0.3 * np.array(SHAPE))[:, None, None, None]).sum(0) < 1
        ) * 1
        image = 100.0 * label + rng.normal(0, 10, SHAPE)
        if number == PATIENTS:
            image, label = rng.normal(0, 10, SHAPE), rng.integers(0, 2, SHAPE)
        write_case(folder / "site", f"case_{number}", image, label)


def direction_of(network: Sam, config: RunConfig, canary: PreparedCase) -> np.ndarray:
    """The canary's gradient at the start, over all its slices, with norm 1."""
    rng = np.random.default_rng(0)
    options = config.training.model_copy(update={"augment": "none"})
    batch = batch_of([(canary, centre) for centre in range(canary.slices)], options, config.samples, network.image_size, rng)
    parameters = trained(network).values()
    network.train()
    backward(partial(network, depth=1), batch, network.pixel_mean.device, options, "fp32", canary.slices)
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return clipped(flat.double().numpy(), 1e-12)


def trial(
    network: Sam, config: RunConfig, start: dict, cases: list[PreparedCase], direction: np.ndarray, seed: int
) -> float:
    """Train a round and score its update."""
    load_tensors(network, start)
    learner = Learner(network, config.training, config.rounds)
    if config.privacy:
        noise = planned(config).steps.noise
        fit_privately(network, learner, cases, config.samples, config.privacy, noise, randomness=SystemRandomness())
    else:
        fit(network, learner, cases, config.samples, seed=seed)
    result = tensors_of(network, start)
    change = torch.cat([(result[name] - start[name]).flatten() for name in start]).double().numpy()
    return float(-change @ direction)


def found(inside: np.ndarray, outside: np.ndarray, share: float) -> tuple[float, float, float]:
    """Share of canaries found at this share of false suspicions, with its interval."""
    hits = int((inside > np.quantile(outside, 1 - share, method="higher")).sum())
    low, high = stats.binomtest(hits, len(inside)).proportion_ci()
    return hits / len(inside), low, high


def proven(inside: np.ndarray, outside: np.ndarray) -> float:
    """The ε that the trials prove with 95 % confidence."""
    (choose_in, judge_in), (choose_out, judge_out) = np.array_split(inside, 2), np.array_split(outside, 2)

    def epsilon(with_canary: np.ndarray, without: np.ndarray, threshold: float) -> float:
        hits, errors = int((with_canary > threshold).sum()), int((without > threshold).sum())
        # 97.5 % for either share, so 95 % for both together.
        low = stats.binomtest(hits, len(with_canary)).proportion_ci(0.95).low
        high = stats.binomtest(errors, len(without)).proportion_ci(0.95).high
        return math.log((low - DELTA) / high) if low > DELTA else -math.inf

    best = max(np.concatenate([choose_in, choose_out]), key=lambda t: epsilon(choose_in, choose_out, t))
    return max(epsilon(judge_in, judge_out, float(best)), 0.0)


def table(cells: dict) -> str:
    rows = ["| | noise | trials | AUC | found at 5 % false | allowed | ε proven |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name, epsilon in ROWS.items():
        cell = cells.get(name)
        if not cell or len(cell["inside"]) < 20:
            rows.append(f"| {name} | missing | | | | | |")
            continue
        inside, outside = np.array(cell["inside"]), np.array(cell["outside"])
        auc = stats.mannwhitneyu(inside, outside).statistic / len(inside) / len(outside)
        share, low, high = found(inside, outside, FALSE)
        allowed = f"{min(math.exp(epsilon) * FALSE + DELTA, 1):.3f}" if epsilon else "–"
        noise = f"{cell['noise']:.2f}" if epsilon else "–"
        shares, trials = f"{share:.3f} ({low:.3f}–{high:.3f})", f"{len(inside)} + {len(outside)}"
        rows.append(f"| {name} | {noise} | {trials} | {auc:.3f} | {shares} | {allowed} | {proven(inside, outside):.2f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="number of trials with the canary, and without")
    parser.add_argument("--minutes", type=float, default=30, help="minutes after which no further trial is started")
    parser.add_argument("--only", default="*", help="compute only the rows whose names match, such as 'ε*'")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    cells = read_cells(RESULTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_patients(folder / "data")
        for name, epsilon in ROWS.items():
            if not fnmatchcase(name, options.only):
                continue
            config = config_of(epsilon)
            data = config.data.model_copy(update={"path": folder / "data"})
            site = read_site(data, 0, "site")
            cases = [prepare(case, label_map(data, "site"), config.samples, folder / "cache") for case in site.cases]
            network = assemble_run(config).network
            start = {k: v.clone() for k, v in tensors_of(network, trained(network)).items()}
            direction = direction_of(network, config, cases[-1])
            noise = planned(config).steps.noise if epsilon else 0
            cell = cells.setdefault(name, {"noise": noise, "inside": [], "outside": []})
            while len(cell["outside"]) < options.trials and time.monotonic() < until:
                seed = 2 * len(cell["outside"])
                cell["inside"].append(trial(network, config, start, cases, direction, seed))
                cell["outside"].append(trial(network, config, start, cases[:-1], direction, seed + 1))
            write_cells(RESULTS, cells)
    text = table(cells)
    write_text(TABLE, "# A canary among the patients\n\n" + text)
    print(text)


if __name__ == "__main__":
    main()
