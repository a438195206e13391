"""A server that chooses a run's settings so that one answer of a site reveals a training slice.

    OMP_NUM_THREADS=1 python benchmarks/reconstruct.py [--minutes 15]

The attack is described in ``tests/helpers/reconstruction.py``. The site has twenty cases of eight slices. A figure is the
highest correlation of the reconstruction with any slice of the site's, of either of two ways to solve for it. In brackets is
the highest correlation with any slice of another site's twenty cases, of which the answer says nothing. Each row is a
variant of the attack. The columns are three sites: one without bounds, one that allows strategy ``full`` within the default
bounds, and one with the defaults. Cells that are missing in ``results/reconstruct.json`` are computed until the minutes are
over.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cells import HERE, read_cells, write_cells

sys.path.insert(0, str(HERE.parent))
from flapsam.base.files import write_text
from flapsam.federation.hospitals.handshake import SiteFailed
from flapsam.learning.prepared import PreparedCase, prepare
from flapsam.run.config import Data, Samples
from flapsam.sites import label_map, list_cases
from tests.helpers.reconstruction import ATTACK, correlation, make_volumes, proposal_of, reconstructions, site_of

CASES = 20
NONE = {"min_steps": 1, "max_learning_rate": 1e9, "min_betas": (0.0, 0.0), "loss_weights": (0.0, 10.0)}
SITES: dict[str, dict[str, Any]] = {
    "no bounds": {"strategies": ["full"], "bounds": NONE, "validation_fraction": 0.999},
    "`full` within the default bounds": {"strategies": ["full"]},
    "defaults": {},
}
WITHIN = {"betas": (0.5, 0.9), "cross_entropy": 0.1, "empty_slices": 1.0, "schedule_power": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it succeeded": {},
    "within the bounds, rate 0.01": {**WITHIN, "learning_rate": 0.01},
    "within the bounds, rate 1e-4": {**WITHIN, "learning_rate": 1e-4},
    "within the bounds, rate 1e-6": {**WITHIN, "learning_rate": 1e-6},
    "rate falls as fast as it may": {**WITHIN, "learning_rate": 1e-3, "schedule_power": 14.0},
    "large batches": {**WITHIN, "learning_rate": 1e-4, "batch_size": 12},
    "few slices": {**WITHIN, "learning_rate": 1e-4, "empty_slices": 0.0},
}


def measure(variant: str, site: str) -> dict[str, Any]:
    """One cell: the correlation, or the code with which the site refused."""
    settings, own = {**ATTACK, **VARIANTS[variant]}, dict(SITES[site])
    with tempfile.TemporaryDirectory() as folder:
        data = make_volumes(Path(folder) / "data", CASES)
        fraction = own.pop("validation_fraction", None)
        if fraction is not None:
            own["data"] = {"path": data, "site": "site_1", "validation_fraction": fraction}
        side = site_of(data, Path(folder) / "state", metrics=False, **own)
        try:
            side.join(proposal_of(settings))
            images = list(reconstructions(side, settings["learning_rate"]))
            samples = side.config.samples
            return {
                "correlation": correlation(images, [*side.client.data.train, *side.client.data.val], samples),
                "control": correlation(images, others(Path(folder), samples), samples),
            }
        except SiteFailed as refusal:
            return {"refused": str(refusal)}


def others(folder: Path, samples: Samples) -> list[PreparedCase]:
    """Cases that are not the site's."""
    data = make_volumes(folder / "others", CASES, seed=1)
    mapping = label_map(Data(path=data, labels={"organ": 1, "lesion": 2}), "site_1")
    return [prepare(case, mapping, samples, folder / "prepared") for case in list_cases(data).cases]


def main() -> None:
    """Compute what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="minutes after which no further cell is started")
    end = time.monotonic() + 60 * parser.parse_args().minutes
    torch.set_num_threads(1)
    kept = HERE / "results" / "reconstruct.json"
    cells = read_cells(kept)
    for variant in VARIANTS:
        for site in SITES:
            name = f"{variant} | {site}"
            if name not in cells and time.monotonic() < end:
                cells[name] = measure(variant, site)
                write_cells(kept, cells)

    def shown(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return "missing"
        return f"refused ({cell['refused']})" if "refused" in cell else f"{cell['correlation']:.3f} ({cell['control']:.3f})"

    lines = ["# Computing a training slice from one answer", "", "`python benchmarks/reconstruct.py` writes this table.", ""]
    lines += ["| attack | " + " | ".join(SITES) + " |", "|---|" + "---:|" * len(SITES)]
    lines += [f"| {v} | " + " | ".join(shown(cells.get(f"{v} | {s}")) for s in SITES) + " |" for v in VARIANTS]
    write_text(HERE / "results" / "reconstruct.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
