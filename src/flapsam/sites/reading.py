"""Which sites and cases a folder holds, whatever its layout."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from flapsam.base.errors import FlapsamError, choose
from flapsam.base.seeds import seed_for
from flapsam.run.config import Data
from flapsam.sites import decathlon, fed_ixi, fed_kits19, fed_prostate, folders, hippocampus, nnunet
from flapsam.sites.case import Case, CaseList, Site
from flapsam.sites.dataset import Dataset
from flapsam.sites.split import draw_test, split_problems
from flapsam.sites.table import read_table

DATASETS: Mapping[str, Dataset] = {
    part.DATASET.name: part.DATASET for part in (fed_kits19, fed_ixi, fed_prostate, hippocampus, nnunet, decathlon, folders)
}
"""Name → data set or layout; a folder is the first that recognises it. A new one is a file and an entry here."""


def find_dataset(path: Path, layout: str = "auto") -> Dataset:
    """The data set of this name, or the first that recognises the folder.

    Raises:
        FlapsamError: there is none of that name, no such folder, or none recognises it.
    """
    if not path.is_dir():
        raise FlapsamError(f"{path}: no such folder; set data.path to the folder that holds the data")
    if layout != "auto":
        return choose("data.layout", layout, DATASETS)
    for dataset in DATASETS.values():
        if dataset.recognises(path):
            return dataset
    raise FlapsamError(
        f"{path}: no SITE/images/CASE.nii.gz found, nor another layout that flapsam knows; `flapsam data list` shows them"
    )


def list_cases(path: Path, layout: str = "auto") -> CaseList:
    """The cases of a folder, before any table or seed says who holds them.

    Raises:
        FlapsamError: as ``find_dataset``, or the folder is not in this layout.
    """
    return find_dataset(path, layout).read(path)


def read_sites(data: Data, seed: int, found: CaseList | None = None) -> list[Site]:
    """All sites in the order of their names, every case with its split (train, val or test).

    Validation cases are those that the data set's own table names; ``hold_out_validation`` draws others.

    Args:
        data: which cases, and who holds them.
        seed: of the run, for splits that are drawn.
        found: the cases of the data's folder, if it has been searched before.

    Raises:
        FlapsamError: anything is wrong with the folder, its layout or its cases, or a site's name.
    """
    sites, problems = read_found(data, seed, found)
    _raise_first(problems)
    return sites


def read_site(data: Data, seed: int, name: str, known_as: str | None = None) -> Site:
    """A federation's site from its own data, under its name there, with the splits that it would have in a simulation.

    Args:
        data: where it is; the fields that name sites are not used.
        seed: of the run.
        name: of the site in the federation.
        known_as: its name in the data, if it has another there and is not alone.

    Raises:
        FlapsamError: as ``read_sites``, or it is not clear which cases are the site's.
    """
    cases, problems = _at_sites(data, seed)
    names = sorted({case.site for case in cases})
    chosen = known_as or (name if name in names else names[0] if len(names) == 1 else None)
    if chosen not in names:
        raise FlapsamError(f"{data.path}: there are {', '.join(names)}; say with data.site which of them is {name}")
    site = Site(name, tuple(replace(case, site=name) for case in cases if case.site == chosen))
    _raise_first([*problems, *split_problems(site)])
    return draw_test(site, data.test_fraction, seed)


def read_found(data: Data, seed: int, found: CaseList | None = None) -> tuple[list[Site], list[str]]:
    """As ``read_sites``, with the problems of single cases in sentences of their own instead of an error.

    Raises:
        FlapsamError: the folder or its layout is wrong, or a site's name.
    """
    cases, problems = _at_sites(data, seed, found)
    sites = [Site(name, tuple(part)) for name, part in groupby(cases, key=lambda case: case.site)]
    names = {site.name for site in sites}
    for field, wanted in (
        ("data.sites", data.sites or []),
        ("data.site_labels", data.site_labels),
        ("data.unseen", data.unseen),
    ):
        for name in wanted:
            if name not in names:
                raise FlapsamError(f"{field}: there is no site '{name}' in {data.path}; it has {', '.join(sorted(names))}")
    if data.sites is not None:
        sites = [site for site in sites if site.name in data.sites]
    problems += [problem for site in sites for problem in split_problems(site)]
    return [draw_test(site, data.test_fraction, seed) for site in sites], problems


def _at_sites(data: Data, seed: int, found: CaseList | None = None) -> tuple[list[Case], list[str]]:
    """Cases at their sites, and the problems of others."""
    found = found or list_cases(data.path, data.layout)
    problems = list(found.problems)
    cases = found.cases
    if data.table is not None:
        cases, missing = _by_table(cases, data.table)
        problems += missing
    if data.simulated_sites is not None:
        cases = _dealt(cases, data.simulated_sites, seed)
    return cases, problems


def _raise_first(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more problems: flapsam data check lists them)" if len(problems) > 1 else ""
        raise FlapsamError(problems[0] + more)


def _by_table(cases: list[Case], table: Path) -> tuple[list[Case], list[str]]:
    """Only the cases of the table, at the sites that it says."""
    known = {case.name: case for case in cases}
    taken, missing = [], []
    for row in read_table(table):
        case = known.get(row["case"])
        if case is None:
            missing.append(f"{table}: case {row['case']} is not among the data")
            continue
        subject, split = row.get("subject") or case.subject, row.get("split") or None
        taken.append(replace(case, site=row["site"], subject=subject, split=split))
    return sorted(taken, key=lambda case: (case.site, case.name)), missing


def _dealt(cases: list[Case], count: int, seed: int) -> list[Case]:
    """The subjects dealt out to so many sites."""
    if len({case.site for case in cases}) > 1:
        raise FlapsamError("data.simulated_sites: the data have sites of their own; leave it out")
    subjects = np.random.default_rng(seed_for(seed, "simulated sites")).permutation(sorted({c.subject for c in cases}))
    if len(subjects) < count:
        raise FlapsamError(f"data.simulated_sites: {count} sites need as many subjects, there are {len(subjects)}")
    site_of = {subject: f"site_{index % count + 1}" for index, subject in enumerate(subjects.tolist())}
    dealt = [replace(case, site=site_of[case.subject]) for case in cases]
    return sorted(dealt, key=lambda case: (case.site, case.name))
