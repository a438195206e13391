"""How the sites of a data set differ, in what a run refuses and in what it would do without a word."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

from flapsam.run.config import Data
from flapsam.sites.case import Case
from flapsam.sites.labels import label_map
from flapsam.sites.numbered import numbered
from flapsam.sites.table import read_table
from flapsam.volumes import case_name

LISTED = 10
"""Number of sites or cases that a sentence lists."""


def modality_problems(counts: Mapping[Case, int]) -> list[str]:
    """A sentence for each site, or else each case, whose number of modalities is not that of most cases.

    Args:
        counts: case → number of its modalities.
    """
    of_site: dict[str, Counter[int]] = {}
    for case, count in counts.items():
        of_site.setdefault(case.site, Counter())[count] += 1
    # Of equally frequent numbers, the smallest.
    usual = min(Counter(counts.values()).most_common(), key=lambda item: (-item[1], item[0]), default=(1, 0))[0]
    others = _listed(site for site, numbers in of_site.items() if usual in numbers)
    whole = {site: next(iter(numbers)) for site, numbers in of_site.items() if len(numbers) == 1 and usual not in numbers}
    of_sites = [
        f"site {site}: its images have {_modalities(count)}, those of {others} have {usual}; all cases need equally many"
        for site, count in whole.items()
    ]
    return of_sites + [
        f"{case.image}: the case has {_modalities(count)}, most cases have {usual}; all cases need equally many"
        for case, count in counts.items()
        if count != usual and case.site not in whole
    ]


def label_notes(values: Mapping[str, Set[int]], data: Data | None) -> list[str]:
    """Sentences about label values and classes that only some sites have.

    Args:
        values: site → the values in its label maps, except 0.
        data: the configuration that says which values are classes, if there is one.
    """
    if not values:
        return []
    if data is None:
        everywhere = set.intersection(*map(set, values.values()))
        some = sorted(set().union(*values.values()) - everywhere)
        what = f"label {'value' if len(some) == 1 else 'values'} {_numbers(some)}"
        by_site = "; ".join(f"{site}: {_numbers(values[site]) or 'none'}" for site in values)
        advice = "where a class has other values, write them into data.site_labels"
        return [f"only some sites have the {what} ({by_site}); {advice}"] if some else []
    maps = {site: label_map(data, site) for site in values}
    notes = []
    for index, name in enumerate(data.classes, start=1):
        annotated = [site for site in values if index in maps[site].annotated]
        has = [site for site in annotated if any(maps[site].index_of.get(value) == index for value in values[site])]
        lacks = [site for site in annotated if site not in has]
        if not has:
            notes.append(f"class {name}: no label map has a voxel of it")
        elif lacks:
            notes.append(
                f"class {name}: label maps of {_listed(has)} have voxels of it, those of {_listed(lacks)} have none; where "
                "it is not annotated or has other values, say so in data.site_labels"
            )
    return notes


def unknown_values(values: Mapping[str, Set[int]], data: Data) -> list[str]:
    """A sentence for each site with label values that belong to no class, which a run refuses.

    Args:
        values: site → the values in its label maps, except 0.
        data: the configuration that says which values are classes.
    """
    unknown = {site: sorted(found - label_map(data, site).index_of.keys()) for site, found in values.items()}
    return [
        f"site {site}: label {'value' if len(found) == 1 else 'values'} {_numbers(found)} "
        f"{'belongs to no class; add it' if len(found) == 1 else 'belong to no class; add them'} "
        "to data.labels as a class, background or ignore"
        for site, found in unknown.items()
        if found
    ]


def name_notes(cases: Sequence[Case]) -> list[str]:
    """A sentence for each site in a folder of its own whose images are called as in nnU-Net."""
    sites = dict.fromkeys(
        case.site for case in cases if case.image.parent.name == "images" and numbered(case_name(case.image)) == case.name
    )
    return [f"site {site}: its images are called CASE_0000, as in nnU-Net, and count as those of CASE" for site in sites]


def unlisted(table: Path, cases: Sequence[Case]) -> list[str]:
    """A sentence about cases that a table does not list, if there are any.

    Args:
        table: the table.
        cases: all cases of the folder.

    Raises:
        FlapsamError: the table is wrong.
    """
    listed = {row.case for row in read_table(table)}
    rest = [case.name for case in cases if case.name not in listed]
    are = "1 case of the folder is" if len(rest) == 1 else f"{len(rest)} cases of the folder are"
    return [f"{table}: {are} not listed and not used: {_listed(rest)}"] if rest else []


def _listed(items: Iterable[str]) -> str:
    names = list(items)
    more = [f"{len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join([*names[:LISTED], *more])


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _modalities(count: int) -> str:
    return "1 modality" if count == 1 else f"{count} modalities"
