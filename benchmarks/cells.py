"""Shared code of the benchmarks: cells kept in a file, their comparison case by case, and the data behind them."""

import argparse
import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from flapsam.base.files import write_text
from flapsam.learning.prepared import PreparedCase, prepare
from flapsam.run.config import RunConfig, Split
from flapsam.run.reading import read_config
from flapsam.sites import hold_out_validation, label_map, read_sites

HERE = Path(__file__).parent
MEASURED = {"aggregator": "flexlora", "compression.codec": "fp32", "lora.projections": ["q", "v"]}
"""Fields with which these benchmarks were measured, before preset ``fast`` had other values."""
Cells = dict[str, dict[str, Any]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Make a parser for the data folder and the number of minutes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="minutes after which no further cell is started")
    return parser


def read_cells(path: Path) -> Cells:
    """The cells that the file at ``path`` holds so far, by name."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_cells(path: Path, cells: Cells) -> None:
    """Write the cells to ``path``."""
    write_text(path, json.dumps(cells, indent=1) + "\n")


def by_sites(
    description: str | None,
    name: str,
    default: Sequence[int],
    measure: Callable[[int, Path], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Measure at the numbers of sites given on the command line, and write the table of all measurements so far.

    Args:
        description: description for the command line's help.
        name: name of the files in ``results``, without extension.
        default: numbers of sites if the command line has none.
        measure: returns the figures for a number of sites. It may use the folder that it receives.
        table: returns the figures as Markdown.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=default)
    kept = HERE / "results" / f"{name}.json"
    rows = {row["sites"]: row for row in json.loads(kept.read_text())} if kept.exists() else {}
    for sites in parser.parse_args().sites:
        with tempfile.TemporaryDirectory() as folder:
            rows[sites] = measure(sites, Path(folder))
        ordered = [rows[key] for key in sorted(rows)]
        write_text(kept, json.dumps(ordered, indent=1) + "\n")
        write_text(kept.with_suffix(".md"), table(ordered))
        print(table(ordered), flush=True)


def write_case(site: Path, name: str, image: NDArray, label: NDArray) -> None:
    """Write a made-up case into a site's folder. Its slices are axial and three times as thick as a pixel is wide."""
    for kind, array in (("images", image.astype(np.float32)), ("labels", label.astype(np.uint8))):
        (site / kind).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 3, 1])), site / kind / f"{name}.nii.gz")


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[str, int]:
    """Mean difference of two runs' Dice by case with its standard error, and the number of cases better in the first."""
    differences = [first[case] - second[case] for case in first]
    error = stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.3f} ± {error:.3f}", sum(difference > 0 for difference in differences)


def hippocampus(data: Path, values: Mapping[str, Any]) -> RunConfig:
    """Configuration of a run on the hippocampus at rank 16 and sam-tiny-1, with the fields in ``values``."""
    fields = {"data.path": str(data.resolve()), "backbone.name": "sam-tiny-1", "lora.rank": 16, **MEASURED, **values}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text("data: {labels: {anterior: 1, posterior: 2}}\n")
        return read_config(path, [f"{field}={json.dumps(value)}" for field, value in fields.items()])


def prepared(config: RunConfig, folder: Path, split: Split, sites: Collection[str] | None = None) -> list[PreparedCase]:
    """Unpack the cases of a split into ``folder``, for the given sites or for all."""
    cases = []
    for site in read_sites(config.data, config.seed):
        if sites is None or site.name in sites:
            labels = label_map(config.data, site.name)
            held_out = hold_out_validation(site, config.data.validation_fraction, config.seed)
            cases += [prepare(case, labels, config.samples, folder / site.name) for case in held_out.of(split)]
    return cases
