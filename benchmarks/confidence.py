"""Does the expected Dice rank cases by their Dice, and are other images found to be unusual, without false alarms?

    python benchmarks/confidence.py RUN --name NAME --other FOLDER --other FOLDER

calibrates the adapter of a simulated run, segments its test cases, looks at changed copies of them and at images of other
organs, and adds the run's column to ``results/confidence.json`` and ``results/confidence.md``. It takes four minutes.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from flapsam.adapters.confidence import Confidence, look_of, read_confidence
from flapsam.adapters.model import Model, load
from flapsam.adapters.trained import find_trained
from flapsam.base.files import write_text
from flapsam.experiments.calibration import calibrate, rank_correlation
from flapsam.experiments.simulation import divided
from flapsam.learning.inference import PredictionOptions
from flapsam.learning.metrics import mean, score_case
from flapsam.sites import Case, label_map, read_sites
from flapsam.sites.pairs import read_pair
from flapsam.volumes import Volume, read_image

RESULTS = Path(__file__).parent / "results"
MOST = 24
"""Number of images that are looked at in each folder of another organ."""


def turned(*axes: int) -> Callable[[NDArray], NDArray]:
    """Flip canonical axes of an image."""
    return lambda array: np.flip(array, axes)


CHANGES: dict[str, Callable[[NDArray], NDArray]] = {
    "contrast inverted": lambda array: array.max() + array.min() - array,
    "upside down": turned(1, 2),
    "slices reversed": turned(2),
    "noise as strong as the image": lambda array: array + np.random.default_rng(0).normal(0, array.std(), array.shape),
}


def changed(image: Volume) -> Iterator[tuple[str, Volume]]:
    """Copies of an image, each changed in one way."""
    canonical = image.to_canonical()
    for name, change in CHANGES.items():
        array = np.ascontiguousarray(change(canonical.array.astype(np.float32)), np.float32)
        yield name, Volume(array, canonical.affine)


def unusual(model: Model, confidence: Confidence, image: Volume, site: str = "") -> bool:
    """Whether an image is flagged."""
    return bool(confidence.familiar.unusual(look_of(model, image, site)))


def measured(run: Path, others: list[Path]) -> dict:
    """The row of a run."""
    trained = find_trained(run)
    assert trained.run is not None
    config, model = trained.run, load(run)
    with TemporaryDirectory() as folder:
        calibration = calibrate(run, Path(folder) / "confidence")
        confidence = read_confidence(Path(folder) / "confidence", trained.folder)
    sites = divided(config, read_sites(config.data, config.seed))
    tests: list[Case] = [case for site in sites for case in site.of("test")]
    dices, inside, flags = [], [], {name: [] for name in ("test cases as they are", *CHANGES)}
    for case in tests:
        labels = label_map(config.data, case.site)
        image, truth = read_pair(case, labels)
        found = model.segment(image, PredictionOptions(confidence=True), site=case.site)
        scores = score_case(case.name, case.site, found.labels, truth.array, None, labels.classes, labels.annotated)
        dice, expected = mean(scores.dice.values()), mean(found.expected)
        if dice is not None and expected is not None:
            told, low, high = confidence.line.dice(expected)
            dices.append((expected, told, dice))
            inside.append(low <= dice <= high)
        flags["test cases as they are"].append(unusual(model, confidence, image, case.site))
        for name, copy in changed(image):
            flags[name].append(unusual(model, confidence, copy, case.site))
        print(f"{case.site}/{case.name}: expected {expected}, Dice {dice}", flush=True)
    for folder in others:
        files = sorted(path for path in folder.rglob("images/*") if path.is_file())
        chosen = [read_image(path) for path in files[:: max(1, len(files) // MOST)][:MOST]]
        flags[f"images of {folder.name}"] = [unusual(model, confidence, image) for image in chosen if image.array.ndim == 3]
    soft, told, dice = (np.array(column) for column in zip(*dices, strict=True))
    rank = bootstrap(
        (soft, dice), rank_correlation, paired=True, vectorized=False, method="percentile", rng=0
    ).confidence_interval
    return {
        "calibrated on": calibration.line.patients,
        "known images": calibration.images,
        "test cases": len(dice),
        "mean Dice": float(dice.mean()),
        "deviation of Dice": float(dice.std(ddof=1)),
        "rank correlation": rank_correlation(soft, dice),
        "rank interval": [float(rank.low), float(rank.high)],
        "mean error": float(np.abs(told - dice).mean()),
        "inside the interval": float(np.mean(inside)),
        "calibration error": calibration.calibration_error,
        "flagged": {name: [int(sum(values)), len(values)] for name, values in flags.items() if values},
    }


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown."""
    names = list(rows)
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["flagged"]))

    def line(title: str, value: Callable[[dict], str]) -> str:
        return f"| {title} | " + " | ".join(value(rows[name]) for name in names) + " |"

    def flagged(kind: str) -> Callable[[dict], str]:
        return lambda row: "{} of {}".format(*row["flagged"][kind]) if kind in row["flagged"] else "–"

    lines = [
        "# Confidence",
        "",
        "`python benchmarks/confidence.py RUN` writes a column. The expected Dice was learned on validation cases, and",
        "everything below was measured on test cases. Intervals are 95 % bootstraps over cases.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
        line("patients to calibrate on, known images", lambda row: f"{row['calibrated on']}, {row['known images']}"),
        line("test cases", lambda row: str(row["test cases"])),
        line("Dice, mean ± deviation", lambda row: f"{row['mean Dice']:.3f} ± {row['deviation of Dice']:.3f}"),
        line(
            "rank correlation of expected and true Dice",
            lambda row: "{:.2f} ({:.2f} to {:.2f})".format(row["rank correlation"], *row["rank interval"]),
        ),
        line("mean error of the expected Dice", lambda row: f"{row['mean error']:.3f}"),
        line("true Dice inside the 95 % interval", lambda row: f"{row['inside the interval']:.0%}"),
        line("expected calibration error of voxels", lambda row: f"{row['calibration error']:.3f}"),
        *(line(f"flagged: {kind}", flagged(kind)) for kind in kinds),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure a run and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, help="name of the column")
    parser.add_argument("--other", type=Path, action="append", default=[], help="folder of sites with another organ")
    arguments = parser.parse_args()
    path = RESULTS / "confidence.json"
    row = measured(arguments.run, arguments.other)
    rows = {**(json.loads(path.read_text()) if path.exists() else {}), arguments.name: row}
    write_text(path, json.dumps(rows, indent=1) + "\n")
    write_text(path.with_suffix(".md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
