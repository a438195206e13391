"""The layout of the Medical Segmentation Decathlon (MSD), and of nnU-Net v1, which follows it.

``TaskNN_Name/dataset.json`` lists pairs under ``training``; labels are value → name. Several modalities are the fourth
axis of one file, in nnU-Net v1 files ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, … that the list names without the
number.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.run.config import ClassValues
from flapsam.sites.case import Case, CaseList
from flapsam.sites.dataset import Dataset
from flapsam.volumes import case_name

DESCRIPTION = "dataset.json"
SITE = "all"
"""Such data do not say who holds what."""


def read(path: Path) -> CaseList:
    """All training pairs, at one site; the files of the makers' own test have no label maps.

    Raises:
        FlapsamError: the description cannot be read.
    """
    cases, problems = [], []
    for pair in read_description(path, "training")["training"]:
        try:
            image, label = path / pair["image"], path / pair["label"]
        except (TypeError, KeyError) as error:
            raise FlapsamError(f"{path / DESCRIPTION}: training must list pairs of image and label") from error
        name = case_name(image)
        images = [image] if image.exists() else sorted(image.parent.glob(f"{name}_[0-9][0-9][0-9][0-9].nii.gz"))
        if images and label.exists():
            cases.append(Case(name, SITE, name, images[0], label, other_images=tuple(images[1:])))
        for there, file, kind in ((images, image, "image"), (label.exists(), label, "label map")):
            if not there:
                problems.append(f"{file}: the {kind} of case {name} is missing; {DESCRIPTION} names it")
    return CaseList(sorted(cases, key=lambda case: case.name), problems)


def labels(path: Path) -> Mapping[str, ClassValues]:
    """Class → value, without background."""
    names = read_description(path, "training").get("labels", {})
    return {plain(name): int(value) for value, name in names.items() if int(value) != 0}


def read_description(path: Path, wanted: str) -> dict[str, Any]:
    """``dataset.json``, which must have a key ``wanted``.

    Raises:
        FlapsamError: it is missing or another kind of file.
    """
    file = path / DESCRIPTION
    try:
        description = json.loads(file.read_text())
    except OSError as error:
        raise FlapsamError(f"{file}: cannot be read ({error.strerror}); this layout needs it") from error
    except ValueError as error:
        raise FlapsamError(f"{file}: not valid JSON") from error
    if not isinstance(description, dict) or wanted not in description:
        raise FlapsamError(f"{file}: '{wanted}' is missing; is this another layout?")
    return description


def glance(path: Path) -> dict[str, Any]:
    """``dataset.json``, or nothing where there is none that can be read."""
    try:
        description = json.loads((path / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return {}
    return description if isinstance(description, dict) else {}


def plain(name: str) -> str:
    """A class's name as configurations have it."""
    return name.strip().lower().replace(" ", "_")


DATASET = Dataset(
    name="msd",
    read=read,
    recognises=lambda path: isinstance(glance(path).get("training"), list),
    labels=labels,
    layout="dataset.json, imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz",
    sites="one; data.simulated_sites deals the subjects out, data.table says who holds what",
)
