"""A check that reads a whole data set and reports all its problems at once, before any training."""

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
from flapsam.run.reading import validated
from flapsam.sites import Case, LabelMap, Site, find_dataset, label_map, list_cases, read_found, unused
from flapsam.sites.differences import label_notes, modality_problems, name_notes, unlisted
from flapsam.sites.pairs import check_geometry
from flapsam.volumes import LeftOut, Volume, read_image, read_label

Result = TypeVar("Result")


@dataclass
class Check:
    """Result of a check."""

    problems: list[str]
    notes: list[str] = field(default_factory=list)
    """What a run would do without a word, one sentence each."""
    values: dict[str, set[int]] = field(default_factory=dict)
    """Site → values found in its label maps, except 0."""
    modalities: dict[Case, int] = field(default_factory=dict)
    """Case → number of its modalities, for every image that can be read."""
    images: dict[bytes, Path] = field(default_factory=dict)
    """SHA-256 digest of an image's voxels → the first file with them."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Files that no case uses."""


def check_data(path: Path, run: RunConfig | None, values: list[int], observer: Observer) -> tuple[dict[str, int], Check]:
    """Check every case of a folder.

    Args:
        path: the data's folder.
        run: the configuration that says how the data are read and which label values are classes.
        values: label values that may occur, if there is no run. Without them, the values in the data's own description may
            occur, or any value if it lists none.
        observer: follows the check.

    Returns:
        Number of cases by site, and the result of the check.

    Raises:
        FlapsamError: the folder does not exist, or its layout is unknown or broken.
    """
    labels: dict[str, ClassValues] = {str(value): value for value in values}
    if run:
        data = run.data.model_copy(update={"path": path})
    else:
        labels = labels or dict(find_dataset(path).labels(path))
        data = validated({"path": path, "labels": labels or {"any": 1}}, Data, str(path))
    found = list_cases(data.path, data.layout)
    sites, problems = read_found(data, run.seed if run else 0, found)
    observer.begin("cases", sum(len(site.cases) for site in sites))
    checked = check_sites(sites, problems, data if run or labels else None, observer.step)
    observer.end()
    if data.table:
        checked.notes += unlisted(data.table, found.cases)
    checked.left_out = unused(path, found.cases)
    return {site.name: len(site.cases) for site in sites}, checked


def check_sites(
    sites: list[Site], problems: list[str], data: Data | None, on_case: Callable[[], None] = lambda: None
) -> Check:
    """Check every case of every site.

    Args:
        sites: the sites that ``read_found`` returns.
        problems: the problems that ``read_found`` returns. The result lists them before those of the check.
        data: the configuration that says which label values are classes. Without it, any value is accepted.
        on_case: called after every case.
    """
    unseen = data.unseen if data else []
    without_training = [site.name for site in sites if not site.of("train") and site.name not in unseen]
    check = Check([*problems, *(f"site {name}: it has no training case; add one" for name in without_training)])
    for site in sites:
        mapping = label_map(data, site.name) if data else None
        check.values[site.name] = set()
        for case in site.cases:
            image, label = _tried(check, read_image, *case.images), _tried(check, read_label, case.label)
            if image:
                check.modalities[case] = image.modalities
                _check_image(check, case, image)
            if label:
                _check_label(check, case, label, mapping)
            if image and label:
                _tried(check, check_geometry, case, image.geometry, label.geometry)
            on_case()
    check.problems += modality_problems(check.modalities)
    check.notes += [*name_notes([case for site in sites for case in site.cases]), *label_notes(check.values, data)]
    return check


def _tried(check: Check, function: Callable[..., Result], *arguments: Any) -> Result | None:
    try:
        return function(*arguments)
    except FlapsamError as error:
        check.problems.append(str(error))
        return None


def _check_image(check: Check, case: Case, image: Volume) -> None:
    if image.array.min() == image.array.max():
        check.problems.append(f"{case.image}: all voxels are {image.array.min():g}; replace the image or leave the case out")
        return
    content = hashlib.sha256(f"{image.array.shape}{image.array.dtype}".encode() + _bytes(image.array)).digest()
    first = check.images.setdefault(content, case.image)
    if first != case.image:
        check.problems.append(f"{case.image}: the image has the same voxels as {first}; leave one of the two cases out")


def _check_label(check: Check, case: Case, label: Volume, mapping: LabelMap | None) -> None:
    check.values[case.site] |= set(np.unique(label.array).tolist()) - {0}
    classes = label.array if mapping is None else _tried(check, mapping.apply, label.array, case.label)
    if classes is not None and not (classes > 0).any():
        check.problems.append(f"{case.label}: no voxel belongs to a class; leave the case out unless the subject is healthy")


def _bytes(array: NDArray) -> bytes:
    return np.ascontiguousarray(array).tobytes()
