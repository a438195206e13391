"""How often the 95 % interval of a mean Dice holds the true mean, for 12, 36 and 100 patients.

    python benchmarks/intervals.py

Draws come from five distributions, whose mean is known: two of the shape that Dice has, one of which misses the structure in
8 % of the cases; even numbers; and two in which every patient has the Dice of a real test case, drawn with replacement from
the first committed cell of ``results/lgg`` and ``results/hippocampus``. Beside Student's t-interval, which flapsam prints,
stand the percentile bootstrap and the studentised bootstrap. The table is ``results/intervals.md``. It takes five minutes.
"""

import json
from collections.abc import Callable

import numpy as np
from cells import HERE
from numpy.typing import NDArray
from scipy.special import stdtrit

from flapsam.base.files import write_text
from flapsam.learning.metrics import mean_of

DRAWS, RESAMPLED, RESAMPLES = 4000, 1000, 999
PATIENTS = (12, 36, 100)


def real(folder: str) -> NDArray:
    """Mean Dice of every test case of a committed cell."""
    first = sorted((HERE / "results" / folder / "cells").glob("*.json"))[0]
    cases = json.loads(first.read_text())["scores"]
    return np.array([np.mean([value for value in case["dice"].values() if value is not None]) for case in cases])


def distributions(rng: np.random.Generator) -> dict[str, tuple[Callable[[int], NDArray], float]]:
    """Name → a function that draws for so many patients, and the true mean."""
    lgg, hippocampus = real("lgg"), real("hippocampus")
    missing = 0.08

    def with_misses(count: int) -> NDArray:
        return np.where(rng.random(count) < missing, 0.0, rng.beta(6, 2, count))

    return {
        "high, skewed (beta 20, 4)": (lambda count: rng.beta(20, 4, count), 20 / 24),
        "lower, 8 % missed": (with_misses, (1 - missing) * 6 / 8),
        "even": (lambda count: rng.random(count), 0.5),
        "cases of LGG": (lambda count: rng.choice(lgg, count), float(lgg.mean())),
        "cases of the hippocampus": (lambda count: rng.choice(hippocampus, count), float(hippocampus.mean())),
    }


def held(draws: NDArray, true: float) -> float:
    """Share of draws whose t-interval, as flapsam computes it, holds the true mean."""
    patients = {str(place): str(place) for place in range(draws.shape[1])}
    count = 0
    for draw in draws:
        mean = mean_of([{str(place): float(value) for place, value in enumerate(draw)}], patients)
        assert mean is not None and mean.low is not None and mean.high is not None
        count += mean.low <= true <= mean.high
    return count / len(draws)


def held_by_bootstrap(draws: NDArray, true: float, rng: np.random.Generator) -> tuple[float, float]:
    """The same share for the percentile bootstrap and for the studentised one."""
    count = draws.shape[1]
    chosen = rng.integers(0, count, (RESAMPLES, count))
    by_percentile = studentised = 0
    for draw in draws:
        again = draw[chosen]
        means, errors = again.mean(1), again.std(1, ddof=1) / count**0.5
        low, high = np.percentile(means, [2.5, 97.5])
        by_percentile += low <= true <= high
        tails = np.percentile((means - draw.mean()) / np.maximum(errors, 1e-12), [2.5, 97.5])
        error = draw.std(ddof=1) / count**0.5
        studentised += draw.mean() - tails[1] * error <= true <= draw.mean() - tails[0] * error
    return by_percentile / len(draws), studentised / len(draws)


def main() -> None:
    """Compute and write the table."""
    rng = np.random.default_rng(0)
    lines = [
        "# How often an interval of 95 % holds the true mean",
        "",
        "`python benchmarks/intervals.py` writes this table.",
        "",
    ]
    lines += ["| distribution of Dice | patients | Student's t | percentile bootstrap | studentised bootstrap |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, (draw, true) in distributions(rng).items():
        for patients in PATIENTS:
            draws = np.stack([draw(patients) for _ in range(DRAWS)])
            shares = [held(draws, true), *held_by_bootstrap(draws[:RESAMPLED], true, rng)]
            lines.append(f"| {name} | {patients} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    quantile = stdtrit(PATIENTS[0] - 1, 0.975)
    lines += ["", f"{DRAWS:,} draws for Student's t (factor {quantile:.3f} at 12 patients), {RESAMPLED:,} for the others."]
    write_text(HERE / "results" / "intervals.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
