"""Layout of nnU-Net v2: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz`` (a file per modality), ``labelsTr/CASE.nii.gz``.

If ``dataset.json`` has the key ``dataset``, the paths under it replace the two folders.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.base.files import exists
from flapsam.run.config import ClassValues
from flapsam.sites.case import Case, CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.decathlon import DESCRIPTION, SITE, bad_labels, glance, label_value, plain, read_description

NUMBER = len("_0000")


def read(path: Path) -> CaseList:
    """Read all training cases as cases of one site.

    Raises:
        FlapsamError: ``dataset.json`` cannot be read, or the files are not NIfTI.
    """
    description = read_description(path, "file_ending")
    ending = str(description["file_ending"])
    if ending not in (".nii.gz", ".nii"):
        raise FlapsamError(
            f"{path / DESCRIPTION}: the files end in {ending}, but flapsam reads NIfTI; convert them to .nii.gz"
        )
    listed: dict[str, tuple[list[Path], Path]] = {}
    if "dataset" in description:
        listed = _listed(path, description["dataset"])
    else:
        for image in sorted((path / "imagesTr").glob(f"[!._]*_[0-9][0-9][0-9][0-9]{ending}")):
            name = image.name[: -len(ending) - NUMBER]
            listed.setdefault(name, ([], path / "labelsTr" / f"{name}{ending}"))[0].append(image)
    cases, problems = [], []
    channels = description.get("channel_names", {})
    modalities = len(channels) or None if isinstance(channels, (dict, list)) else None
    for name, (images, label) in sorted(listed.items()):
        missing = [file for file in (*images, label) if not exists(file)]
        problems += [f"{file}: this file of case {name} is missing; add it or remove the case" for file in missing]
        if modalities is not None and len(images) != modalities:
            problems.append(
                f"{images[0]}: case {name} has {len(images)} modalities, {DESCRIPTION} lists {modalities}; make them agree"
            )
        elif not missing:
            cases.append(Case(name, SITE, name, images[0], label, other_images=tuple(images[1:])))
    unused = sorted(file for file in (path / "labelsTr").glob(f"[!._]*{ending}") if file.name[: -len(ending)] not in listed)
    problems += [f"{file}: this label map has no image; add the image or remove the label map" for file in unused]
    return CaseList(cases, problems)


def labels(path: Path) -> Mapping[str, ClassValues]:
    """Class → label value or values, without the background but with ``ignore``.

    Raises:
        FlapsamError: regions overlap, so that a value belongs to several classes.
    """
    classes: dict[str, ClassValues] = {}
    seen: set[int] = set()
    names = read_description(path, "labels")["labels"]
    if not isinstance(names, dict):
        raise bad_labels(path)
    for name, value in names.items():
        values = [label_value(path, v) for v in value] if isinstance(value, list) else [label_value(path, value)]
        if not values:
            raise bad_labels(path)
        if values == [0]:
            continue
        if seen & set(values):
            raise FlapsamError(
                f"{path / DESCRIPTION}: regions overlap; assign every label value to one class in data.labels"
            )
        seen |= set(values)
        classes[plain(name)] = values[0] if len(values) == 1 else values
    return classes


def _listed(path: Path, dataset: Any) -> dict[str, tuple[list[Path], Path]]:
    """The images and the label map of each case under the key ``dataset``."""
    listed = {}
    for name, files in dataset.items() if isinstance(dataset, dict) else [("", None)]:
        files = files if isinstance(files, dict) else {}
        images, label = files.get("images"), files.get("label")
        if not isinstance(images, list) or not images or not all(isinstance(file, str) for file in [*images, label]):
            raise FlapsamError(
                f"{path / DESCRIPTION}: case '{name}' under 'dataset' has no images or no label; write each as "
                '"CASE": {"images": ["imagesTr/CASE_0000.nii.gz"], "label": "labelsTr/CASE.nii.gz"}'
            )
        listed[name] = [_place(path, image) for image in images], _place(path, str(label))
    return listed


def _place(path: Path, file: str) -> Path:
    return path / os.path.expandvars(file)


DATASET = Dataset(
    name="nnunet",
    read=read,
    recognises=lambda path: {"channel_names", "file_ending"} <= glance(path).keys(),
    labels=labels,
    layout="dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz",
    sites="one; simulate more with data.simulated_sites, or assign cases to sites with data.table",
)
