"""Time and size of a report over 100 rounds, 40 sites and 500 test cases in three modes.

The ledger is synthetic, and the volumes are small (48 × 48 × 32). Three cases of every site are shown in slices.

    python benchmarks/large_report.py
"""

import json
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nibabel
import numpy as np
import yaml

ROUNDS, SITES, CASES = 100, 40, 500
CLASSES = ("kidney", "tumour")
SHAPE = (48, 48, 32)


def make_run(folder: Path) -> Path:
    """Write a run's folder and its sites' volumes, as a simulation in three modes leaves them."""
    draw = np.random.default_rng(0)
    sites = [f"hospital_{index:02}" for index in range(SITES)]
    cases = [(sites[index % SITES], f"case_{index:04}") for index in range(CASES)]
    run = folder / "run"
    run.mkdir(parents=True)
    config = {
        "data": {"path": str(folder / "sites"), "labels": {name: value for value, name in enumerate(CLASSES, 1)}},
        "rounds": {"count": ROUNDS},
        "modes": ["local", "federated", "centralised"],
        "output": str(run),
    }
    (run / "run.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(
        json.dumps({"run": "0" * 32, "flapsam": "0", "command": ["flapsam"], "packages": {}})
    )
    write_volumes(folder / "sites", run / "predictions", cases, draw)
    with (run / "events.jsonl").open("w") as file:
        for event in ledger(sites, cases, draw):
            file.write(json.dumps(event) + "\n")
    return run


def write_volumes(sites: Path, predictions: Path, cases: list[tuple[str, str]], draw: np.random.Generator) -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in SHAPE], indexing="ij"))
    for site, case in cases:
        centre = draw.uniform(-0.3, 0.3, (3, 1, 1, 1))
        distance = np.linalg.norm(grid - centre, axis=0)
        truth = (distance < 0.5).astype(np.uint8) + (distance < 0.2)
        image = (80 * truth + draw.normal(0, 20, SHAPE)).astype(np.int16)
        predicted = np.roll(truth, 2, axis=0)
        for path, array in (
            (sites / site / "images", image),
            (sites / site / "labels", truth),
            *((predictions / mode / site, predicted) for mode in ("local", "federated", "centralised")),
        ):
            path.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([0.8, 0.8, 2.0, 1.0])), path / f"{case}.nii.gz")
    rows = [f"{case},{site},test,{case}" for site, case in cases]
    (sites / "sites.csv").write_text("\n".join(["case,site,split,subject", *rows]) + "\n")


def ledger(sites: list[str], cases: list[tuple[str, str]], draw: np.random.Generator) -> list[dict]:
    clock = datetime(2026, 1, 1, tzinfo=UTC)
    events: list[dict] = []

    def write(event: str, **fields: object) -> None:
        nonlocal clock
        clock += timedelta(seconds=1)
        events.append({"event": event, "time": clock.isoformat(timespec="seconds"), **fields})

    for site in sites:
        write("site", site=site, cases={"train": 40, "val": 6, "test": CASES // SITES})
    federations = [("federated", sites), *((f"local/{site}", [site]) for site in sites), ("centralised", ["centralised"])]
    for name, members in federations:
        for number in range(1, ROUNDS + 1):
            for site in members:
                dice = {"mean": 0.9 - 0.8 / number + draw.normal(0, 0.02), **dict.fromkeys(CLASSES, 0.8)}
                write("validation", federation=name, round=number, site=site, dice=dice)
                if name == "federated" and draw.random() < 0.01:
                    write("missing", federation=name, round=number, site=site, reason="it did not answer in time")
                    continue
                fit = {
                    "loss": 1 / number,
                    "cross_entropy": 0.1,
                    "dice_loss": 0.1,
                    "steps": 50.0,
                    "seconds": 4.0,
                    "waiting": 0.1,
                }
                write("fit", federation=name, round=number, site=site, bytes_down=80_000, bytes_up=81_000, slices=900, **fit)
            write("round", federation=name, round=number, seconds=4.5 * len(members), aggregation_seconds=0.1)
    for mode in ("local", "federated", "centralised"):
        for site, case in cases:
            name = f"local/{site}" if mode == "local" else mode
            dice = {class_name: float(draw.uniform(0.4, 0.95)) for class_name in CLASSES}
            write("test", federation=name, site=site, case=case, dice=dice, hd95=dict.fromkeys(CLASSES, 4.2))
    write("end")
    return events


def main() -> None:
    from flapsam.report.page import write_report

    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        began = time.perf_counter()
        page = write_report(run)
        seconds = time.perf_counter() - began
        without = write_report(run, Path(folder) / "plain.html", images=False)
        print(f"{ROUNDS} rounds, {SITES} sites, {CASES} cases: {seconds:.1f} s, {page.stat().st_size / 1e6:.2f} MB")
        print(f"without slices {without.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
