"""The layout of nnU-Net v2: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz`` (a file a modality), ``labelsTr/CASE.nii.gz``.

Where the description has ``dataset``, its paths are taken in the place of the folders.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.run.config import ClassValues
from flapsam.sites.case import Case, CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.decathlon import DESCRIPTION, SITE, glance, plain, read_description

NUMBER = len("_0000")


def read(path: Path) -> CaseList:
    """All training cases, at one site.

    Raises:
        FlapsamError: the description cannot be read, or files are no NIfTI.
    """
    description = read_description(path, "file_ending")
    ending = description["file_ending"]
    if ending not in (".nii.gz", ".nii"):
        raise FlapsamError(f"{path / DESCRIPTION}: files end in {ending}; convert them to .nii.gz")
    given: dict[str, tuple[list[Path], Path]] = {}
    if "dataset" in description:
        for name, files in description["dataset"].items():
            given[name] = [_place(path, image) for image in files["images"]], _place(path, files["label"])
    else:
        for image in sorted((path / "imagesTr").glob(f"[!._]*_[0-9][0-9][0-9][0-9]{ending}")):
            name = image.name[: -len(ending) - NUMBER]
            given.setdefault(name, ([], path / "labelsTr" / f"{name}{ending}"))[0].append(image)
    cases, problems = [], []
    modalities = len(description.get("channel_names", {})) or None
    for name, (images, label) in sorted(given.items()):
        missing = [file for file in (*images, label) if not file.exists()]
        problems += [f"{file}: this file of case {name} is missing" for file in missing]
        if modalities is not None and len(images) != modalities:
            problems.append(f"{images[0]}: case {name} has {len(images)} modalities, {DESCRIPTION} names {modalities}")
        elif not missing:
            cases.append(Case(name, SITE, name, images[0], label, other_images=tuple(images[1:])))
    unused = sorted(file for file in (path / "labelsTr").glob(f"[!._]*{ending}") if file.name[: -len(ending)] not in given)
    return CaseList(cases, [*problems, *(f"{file}: its image is missing; add it or remove this" for file in unused)])


def labels(path: Path) -> Mapping[str, ClassValues]:
    """Class → value, without background; ``ignore`` stays.

    Raises:
        FlapsamError: regions overlap.
    """
    found: dict[str, ClassValues] = {}
    seen: set[int] = set()
    for name, value in read_description(path, "labels")["labels"].items():
        values = [int(v) for v in value] if isinstance(value, list) else [int(value)]
        if values == [0]:
            continue
        if seen & set(values):
            raise FlapsamError(f"{path / DESCRIPTION}: regions overlap; say under data.labels which values are which class")
        seen |= set(values)
        found[plain(name)] = values[0] if len(values) == 1 else values
    return found


def _place(path: Path, file: str) -> Path:
    return path / os.path.expandvars(file)


DATASET = Dataset(
    name="nnunet",
    read=read,
    recognises=lambda path: {"channel_names", "file_ending"} <= glance(path).keys(),
    labels=labels,
    layout="dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz",
    sites="one; data.simulated_sites deals the subjects out, data.table says who holds what",
)
