"""Runs for the report's tests, with ledgers written by hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.helpers.sites import AFFINE, ball, save

CLASSES = ("ball", "core")
DICE = {"federated": 0.8, "local": 0.7}
"""Mode → Dice of class ball in a site's first case. Each further case has 0.01 more, and class core has 0.1 less."""


@dataclass
class Writer:
    """Writes a ledger with one event per second."""

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, event: str, **fields: Any) -> None:
        second = len(self.events)
        time = f"2026-01-01T00:{second // 60:02}:{second % 60:02}+00:00"
        self.events.append({"event": event, "time": time, **fields})
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.events))


def make_run(
    folder: Path,
    *,
    name: str = "run",
    sites: Sequence[str] = ("alpha", "beta"),
    case: str = "case",
    cases: int = 3,
    rounds: int = 2,
    modes: Sequence[str] = ("federated", "local"),
    notes: str = "",
    better: float = 0.0,
    troubles: Sequence[Mapping[str, Any]] = (),
    over: bool = True,
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """Create a run's folder and, next to it, the volumes of its sites, all of which are test cases.

    Args:
        folder: folder for the run and its data.
        name: name of the run.
        sites: names of the sites.
        case: prefix of the cases' names, before their number.
        cases: number of cases of each site.
        rounds: number of rounds of each cohort.
        modes: modes that were trained.
        notes: notes in the configuration.
        better: added to every Dice.
        troubles: events that are written after the first round.
        over: whether the run has ended.
        fields: further fields of the configuration.

    Returns:
        The run's folder.
    """
    run = folder / name
    run.mkdir(parents=True)
    tree = {
        "data": {"path": str(folder / "sites"), "labels": {"ball": 1, "core": 2}},
        "rounds": {"count": rounds},
        "modes": list(modes),
        "notes": notes,
        "output": str(run),
        **(fields or {}),
    }
    (run / "run.yaml").write_text(yaml.safe_dump(tree))
    environment = {
        "run": "0" * 32,
        "flapsam": "0.1.0",
        "command": ["/bin/flapsam", "simulate", "a run.yaml"],
        "packages": {"torch": "2"},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    write = Writer(run / "events.jsonl")
    for site in sites:
        write("site", site=site, cases={"train": 4, "val": 1, "test": cases})
    for mode in modes:
        members = {"federated": sites, "centralised": ("centralised",)}.get(mode)
        for federation, participants in [(mode, members)] if members else [(f"{mode}/{site}", (site,)) for site in sites]:
            _rounds(write, federation, participants, rounds, troubles if mode == "federated" else ())
    _tests(write, folder, run, sites, [f"{case}{index}" for index in range(cases)], modes, better)
    if over:
        write("end")
    return run


def _rounds(
    write: Writer, federation: str, sites: Sequence[str], rounds: int, troubles: Sequence[Mapping[str, Any]]
) -> None:
    silent = {(trouble["round"], trouble["site"]) for trouble in troubles if "round" in trouble}
    for number in range(1, rounds + 1):
        for index, site in enumerate(sites):
            if (number, site) in silent:
                continue
            fit = {"loss": 1 / number + index / 10, "cross_entropy": 0.3, "dice_loss": 0.2, "steps": 6.0}
            traffic = {"bytes_up": 2048 * number, "bytes_down": 1024}
            write(
                "fit", federation=federation, round=number, site=site, slices=9, seconds=2.0, waiting=0.5, **traffic, **fit
            )
        write("round", federation=federation, round=number, seconds=2.5 * len(sites), aggregation_seconds=0.25)
        if number == 1:
            for trouble in troubles:
                write(**{"federation": federation, **trouble})
    for index, site in enumerate(sites):
        dice = {"mean": 0.6 + index / 10, "ball": 0.65, "core": 0.55}
        write("validation", federation=federation, round=rounds, site=site, dice=dice)
        write("delivery", federation=federation, round=rounds, site=site, bytes_down=512)


def _tests(
    write: Writer, folder: Path, run: Path, sites: Sequence[str], cases: Sequence[str], modes: Sequence[str], better: float
) -> None:
    rng = np.random.default_rng(0)
    rows = ["case,site,split"]
    for site in sites:
        for index, case in enumerate(cases):
            rows.append(f'"{case.replace(chr(34), chr(34) * 2)}","{site.replace(chr(34), chr(34) * 2)}",test')
            truth = ball((20, 16, 6), rng)
            image = (100 * truth + rng.normal(0, 10, truth.shape)).astype(np.float32)
            if not (folder / "sites" / site / "images" / f"{case}.nii.gz").exists():
                save(image, folder / "sites" / site / "images" / f"{case}.nii.gz", AFFINE)
                save(truth, folder / "sites" / site / "labels" / f"{case}.nii.gz", AFFINE)
            for mode in modes:
                save(np.roll(truth, 1, axis=0), run / "predictions" / mode / site / f"{case}.nii.gz", AFFINE)
                federation = f"local/{site}" if mode == "local" else mode
                dice = DICE.get(mode, 0.9) + index / 100 + better
                scores = {"dice": {"ball": dice, "core": dice - 0.1}, "hd95": {"ball": 1.5, "core": None}}
                write("test", federation=federation, site=site, case=case, **scores)
    (folder / "sites" / "sites.csv").write_text("\n".join(rows) + "\n")
