"""Layout of the Medical Segmentation Decathlon (MSD), and of nnU-Net v1, which follows it.

``TaskNN_Name/dataset.json`` lists pairs of image and label map under ``training``, and maps label values to names under
``labels``. The decathlon stores several modalities along the fourth axis of one file. nnU-Net v1 stores one file per
modality, ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, …, and lists them without the number. A list that has the first file's
number is read, too.
"""

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flapsam.base.files import exists
from flapsam.base.names import as_name
from flapsam.run.config import ClassValues
from flapsam.sites.case import Case, CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.description import DESCRIPTION, glance, place, read_description, values_by_name
from flapsam.sites.numbered import gaps, numbered
from flapsam.volumes import case_name

SITE = "all"
"""Name of the only site, since this layout does not say who holds which case."""


class Pair(BaseModel):
    """An image and its label map, as paths in the data's folder."""

    image: str
    label: str


class Training(BaseModel):
    """The key of ``dataset.json`` that lists the pairs."""

    training: list[Pair]


class Labels(BaseModel):
    """The key of ``dataset.json`` that names the classes."""

    labels: dict[str, Any] = {}


def read(path: Path) -> CaseList:
    """Read all training pairs as cases of one site.

    The publisher's test images are left out, since they have no label maps.

    Raises:
        FlapsamError: ``dataset.json`` cannot be read, does not list pairs, or names a file outside the data's folder.
    """
    cases, problems = [], []
    for number, pair in enumerate(read_description(path, Training).training):
        entry = f"{path / DESCRIPTION}, training, entry {number}"
        image, label = place(path, pair.image, entry), place(path, pair.label, entry)
        name = as_name(case_name(image), entry)
        if numbered(name) == case_name(label):
            name = case_name(label)
        listed = exists(image) and case_name(image) == name
        images = [image] if listed else sorted(image.parent.glob(f"{escape(name)}_[0-9][0-9][0-9][0-9].nii.gz"))
        if images and exists(label):
            cases.append(Case(name, SITE, name, images[0], label, other_images=tuple(images[1:])))
        for there, file, kind in ((images, image, "image"), (exists(label), label, "label map")):
            if not there:
                problems.append(
                    f"{file}: the {kind} of case {name} is missing; add it or remove the case from {DESCRIPTION}"
                )
    problems += [gap for case in cases for gap in gaps(case)]
    return CaseList(sorted(cases, key=lambda case: case.name), problems)


def labels(path: Path) -> Mapping[str, ClassValues]:
    """Class → label value or values, without the background.

    Raises:
        FlapsamError: ``dataset.json`` cannot be read, or the labels are wrong.
    """
    named = values_by_name(read_description(path, Labels).labels, path)
    return {name: values[0] if len(values) == 1 else values for name, values in named.items()}


DATASET = Dataset(
    name="msd",
    read=read,
    recognises=lambda path: isinstance(glance(path).get("training"), list),
    labels=labels,
    layout="dataset.json, imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz",
    sites="one; simulate more with data.simulated_sites, or assign cases to sites with data.table",
)
