"""Reading the sites and cases of a folder in any layout."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from flapsam.base.errors import FlapsamError, choose
from flapsam.base.files import exists
from flapsam.base.names import NameRefused, as_name, check_distinct, clash, folded
from flapsam.base.seeds import seed_for
from flapsam.run.config import Data
from flapsam.sites import decathlon, fed_ixi, fed_kits19, fed_prostate, folders, hippocampus, nnunet
from flapsam.sites.case import Case, CaseList, Site
from flapsam.sites.dataset import Dataset
from flapsam.sites.description import DESCRIPTION, read_json
from flapsam.sites.near import near
from flapsam.sites.split import draw_test, split_problems
from flapsam.sites.table import read_table

DATASETS: Mapping[str, Dataset] = {
    module.DATASET.name: module.DATASET
    for module in (fed_kits19, fed_ixi, fed_prostate, hippocampus, nnunet, decathlon, folders)
}
"""Name → data set or layout. The first that recognises a folder is used. A new one needs a module and an entry here."""


def find_dataset(path: Path, layout: str = "auto") -> Dataset:
    """The data set or layout of this name, or with ``auto`` the first that recognises the folder.

    Raises:
        FlapsamError: the folder does not exist, the name is unknown, or nothing recognises the folder.
    """
    if not path.is_dir():
        raise FlapsamError(f"{path}: no such folder; set data.path to the folder that holds the data")
    if layout != "auto":
        return choose("data.layout", layout, DATASETS)
    for dataset in DATASETS.values():
        if dataset.recognises(path):
            return dataset
    if exists(path / DESCRIPTION):
        read_json(path / DESCRIPTION)
        raise FlapsamError(
            f"{path / DESCRIPTION}: it has neither a list 'training', as for the Decathlon and nnU-Net v1, nor "
            "'channel_names' and 'file_ending', as for nnU-Net v2; add what is missing"
        )
    raise FlapsamError(
        f"{path}: unknown layout; arrange the files as SITE/images/CASE.nii.gz and SITE/labels/CASE.nii.gz, or in "
        "another layout that `flapsam data list` shows"
    )


def list_cases(path: Path, layout: str = "auto") -> CaseList:
    """Read the cases of a folder as they are there, before a table or a seed assigns them to other sites.

    A case whose name or site's name is refused, or is that of another case, becomes a problem.

    Raises:
        FlapsamError: as in ``find_dataset``, or the folder does not follow the layout, or two sites have one name.
    """
    found = find_dataset(path, layout).read(path)
    problems = list(found.problems)
    cases: dict[tuple[str, str], Case] = {}
    for case in found.cases:
        try:
            case = replace(case, name=as_name(case.name, str(case.image)), site=as_name(case.site, str(case.image)))
        except NameRefused as refusal:
            problems.append(str(refusal))
            continue
        key = folded(case.site), folded(case.name)
        if key in cases:
            problems.append(f"{case.image}: at site {case.site}, case {clash(cases[key].name, case.name)}")
        else:
            cases[key] = case
    check_distinct(dict.fromkeys(case.site for case in cases.values()), str(path))
    return CaseList(list(cases.values()), problems)


def read_sites(data: Data, seed: int, found: CaseList | None = None) -> list[Site]:
    """Read all sites, sorted by name, with every case in a split (train, val or test).

    Only cases that the data set's own table puts into ``val`` are validation cases here. ``hold_out_validation`` draws
    others.

    Args:
        data: the configuration that says which cases are used and which site holds each.
        seed: the run's seed, for splits that are drawn.
        found: the cases of the folder, if they have been read before.

    Raises:
        FlapsamError: the folder, its layout, a case or the name of a site is wrong.
    """
    sites, problems = read_found(data, seed, found)
    _raise_first(problems)
    return sites


def read_site(data: Data, seed: int, name: str, known_as: str | None = None) -> Site:
    """Read one hospital's own data as its site in a federation, with the splits that it would have in a simulation.

    Args:
        data: the configuration of the data. Its fields that name sites are not used.
        seed: the run's seed.
        name: the site's name in the federation.
        known_as: the site's name in the data, needed if that differs and the data have several sites.

    Raises:
        FlapsamError: as in ``read_sites``, or it is unclear which cases are the site's.
    """
    cases, problems = _at_sites(data, seed)
    names = sorted({case.site for case in cases})
    chosen = known_as or (name if name in names else names[0] if len(names) == 1 else None)
    if chosen not in names:
        raise FlapsamError(
            f"{data.path}: unclear which of the sites {', '.join(names)} is {name}; set data.site to one of these names"
        )
    site = Site(name, tuple(replace(case, site=name) for case in cases if case.site == chosen))
    _raise_first([*problems, *split_problems(site)])
    return draw_test(site, data.test_fraction, seed)


def read_found(data: Data, seed: int, found: CaseList | None = None) -> tuple[list[Site], list[str]]:
    """Read all sites like ``read_sites``, but return the problems of single cases instead of raising the first.

    Returns:
        The sites, and one sentence for each problem.

    Raises:
        FlapsamError: the folder, its layout or the name of a site is wrong.
    """
    cases, problems = _at_sites(data, seed, found)
    sites = [Site(name, tuple(part)) for name, part in groupby(cases, key=lambda case: case.site)]
    names = {site.name for site in sites}
    for field, mentioned in (
        ("data.sites", data.sites or []),
        ("data.site_labels", data.site_labels),
        ("data.unseen", data.unseen),
    ):
        for name in mentioned:
            if name not in names:
                raise FlapsamError(f"{field}: no site '{name}' in {data.path}; choose from {', '.join(sorted(names))}")
    if data.sites is not None:
        sites = [site for site in sites if site.name in data.sites]
    problems += [problem for site in sites for problem in split_problems(site)]
    return [draw_test(site, data.test_fraction, seed) for site in sites], problems


def _at_sites(data: Data, seed: int, found: CaseList | None = None) -> tuple[list[Case], list[str]]:
    """The cases at the sites that hold them, and the problems of others."""
    case_list = found or list_cases(data.path, data.layout)
    problems = list(case_list.problems)
    cases = case_list.cases
    if data.table is not None:
        cases, missing = _by_table(cases, data.table)
        problems += missing
    if data.simulated_sites is not None:
        cases = _dealt(cases, data.simulated_sites, seed)
    return cases, problems


def _raise_first(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more; `flapsam data check` lists all)" if len(problems) > 1 else ""
        raise FlapsamError(problems[0] + more)


def _by_table(cases: list[Case], table: Path) -> tuple[list[Case], list[str]]:
    """The cases that the table lists, at the sites that it names, and a sentence for each case missing from the data."""
    by_name: dict[str, list[Case]] = {}
    for case in cases:
        by_name.setdefault(case.name, []).append(case)
    assigned, problems = [], []
    lines: dict[Path, int] = {}
    for row in read_table(table):
        named = by_name.get(row.case, [])
        # Of several sites' cases with one name, the table can mean only the one at its own site.
        meant = [case for case in named if case.site == row.site] if len(named) > 1 else named
        where = f"{table}, line {row.line}"
        if meant:
            case = meant[0]
            first = lines.setdefault(case.image, row.line)
            if first != row.line:
                problems.append(
                    f"{where}: case {row.case} is in line {first}, too; a case belongs to one site, so remove a row"
                )
                continue
            assigned.append(replace(case, site=row.site, subject=row.subject or case.subject, split=row.split))
        elif named:
            sites = ", ".join(case.site for case in named)
            problems.append(
                f"{where}: case {row.case} is at several sites ({sites}), but not at {row.site}; rename the cases"
            )
        elif other := near(row.case, by_name):
            problems.append(
                f"{where}: case {row.case} is not in the data, but {other} is; correct the table (spreadsheets drop zeros)"
            )
        else:
            problems.append(f"{where}: case {row.case} is not in the data; add it or remove its row")
    return sorted(assigned, key=lambda case: (case.site, case.name)), problems


def _dealt(cases: list[Case], count: int, seed: int) -> list[Case]:
    """Deal the subjects out to ``count`` simulated sites, in random order."""
    if len({case.site for case in cases}) > 1:
        raise FlapsamError("data.simulated_sites: the data have sites of their own; remove this field")
    subjects = np.random.default_rng(seed_for(seed, "simulated sites")).permutation(sorted({c.subject for c in cases}))
    if len(subjects) < count:
        raise FlapsamError(
            f"data.simulated_sites: {count} sites are too many for {len(subjects)} subjects; choose fewer sites"
        )
    site_of = {subject: f"site_{index % count + 1}" for index, subject in enumerate(subjects.tolist())}
    dealt = [replace(case, site=site_of[case.subject]) for case in cases]
    return sorted(dealt, key=lambda case: (case.site, case.name))
