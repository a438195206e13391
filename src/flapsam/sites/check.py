"""Everything that is wrong with a data set, at once, before any training."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.run.config import ClassValues, Data, RunConfig
from flapsam.run.observer import Observer
from flapsam.sites import Case, LabelMap, Site, find_dataset, label_map, read_found
from flapsam.sites.pairs import check_geometry
from flapsam.volumes import Volume, read_image, read_label

Result = TypeVar("Result")


@dataclass
class Check:
    """What a check found."""

    problems: list[str]
    values: set[int] = field(default_factory=set)
    """In the label maps, but 0."""
    images: dict[bytes, Path] = field(default_factory=dict)
    """By content."""


def check_data(path: Path, run: RunConfig | None, values: list[int], observer: Observer) -> tuple[dict[str, int], Check]:
    """Read every case of a folder.

    Args:
        path: the data's folder.
        run: says how they are read and which label values are classes.
        values: without a run, the label values that may occur; without any, the data's own description says, or all may.
        observer: is told of the cases.

    Returns:
        Cases by site, and what is wrong.

    Raises:
        FlapsamError: the folder or its layout is wrong.
    """
    labels: dict[str, ClassValues] = {str(value): value for value in values}
    if run:
        data = run.data.model_copy(update={"path": path})
    else:
        labels = labels or dict(find_dataset(path).labels(path))
        data = Data(path=path, labels=labels or {"any": 1})
    sites, problems = read_found(data, run.seed if run else 0)
    observer.begin("cases", sum(len(site.cases) for site in sites))
    found = check_sites(sites, problems, data if run or labels else None, observer.step)
    observer.end()
    return {site.name: len(site.cases) for site in sites}, found


def check_sites(
    sites: list[Site], problems: list[str], data: Data | None, on_case: Callable[[], None] = lambda: None
) -> Check:
    """Read every case of every site.

    Args:
        sites: as ``read_found`` gives them.
        problems: that it found; the check's own follow.
        data: says which label values are classes; without it any may be.
        on_case: called after every case.
    """
    check = Check([*problems, *(f"site {site.name}: it has no training case" for site in sites if not site.of("train"))])
    for site in sites:
        mapping = label_map(data, site.name) if data else None
        for case in site.cases:
            image, label = _tried(check, read_image, *case.images), _tried(check, read_label, case.label)
            if image:
                _check_image(check, case, image)
            if label:
                _check_label(check, case, label, mapping)
            if image and label:
                _tried(check, check_geometry, case, image.geometry, label.geometry)
            on_case()
    return check


def _tried(check: Check, function: Callable[..., Result], *arguments: Any) -> Result | None:
    try:
        return function(*arguments)
    except FlapsamError as error:
        check.problems.append(str(error))
        return None


def _check_image(check: Check, case: Case, image: Volume) -> None:
    if image.array.min() == image.array.max():
        check.problems.append(f"{case.image}: all its voxels are {image.array.min():g}, so there is nothing to see")
        return
    content = hashlib.sha256(f"{image.array.shape}{image.array.dtype}".encode() + _bytes(image.array)).digest()
    other = check.images.setdefault(content, case.image)
    if other != case.image:
        check.problems.append(f"{case.image}: the same voxels as {other}; leave one out")


def _check_label(check: Check, case: Case, label: Volume, mapping: LabelMap | None) -> None:
    check.values |= set(np.unique(label.array).tolist()) - {0}
    classes = label.array if mapping is None else _tried(check, mapping.apply, label.array, case.label)
    if classes is not None and not (classes > 0).any():
        check.problems.append(f"{case.label}: no voxel belongs to a class; leave the case out unless it is healthy")


def _bytes(array: NDArray) -> bytes:
    return np.ascontiguousarray(array).tobytes()
