"""Layout of the Medical Segmentation Decathlon (MSD), and of nnU-Net v1, which follows it.

``TaskNN_Name/dataset.json`` lists pairs of image and label map under ``training``, and maps label values to names under
``labels``. The decathlon stores several modalities along the fourth axis of one file. nnU-Net v1 stores one file per
modality, ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, …, and lists them without the number.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.base.files import exists, read_text
from flapsam.run.config import ClassValues
from flapsam.sites.case import Case, CaseList
from flapsam.sites.dataset import Dataset
from flapsam.volumes import case_name

DESCRIPTION = "dataset.json"
SITE = "all"
"""Name of the only site, since this layout does not say who holds which case."""


def read(path: Path) -> CaseList:
    """Read all training pairs as cases of one site.

    The publisher's test images are left out, since they have no label maps.

    Raises:
        FlapsamError: ``dataset.json`` cannot be read or does not list pairs.
    """
    cases, problems = [], []
    pairs = read_description(path, "training")["training"]
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) and pair[key] for key in ("image", "label")):
            raise FlapsamError(
                f"{path / DESCRIPTION}: 'training' must list pairs; write each as "
                '{"image": "imagesTr/CASE.nii.gz", "label": "labelsTr/CASE.nii.gz"}'
            )
        image, label = path / pair["image"], path / pair["label"]
        name = case_name(image)
        images = [image] if exists(image) else _numbered(image.parent, name)
        if images and exists(label):
            cases.append(Case(name, SITE, name, images[0], label, other_images=tuple(images[1:])))
        for there, file, kind in ((images, image, "image"), (exists(label), label, "label map")):
            if not there:
                problems.append(
                    f"{file}: the {kind} of case {name} is missing; add it or remove the case from {DESCRIPTION}"
                )
    return CaseList(sorted(cases, key=lambda case: case.name), problems)


def labels(path: Path) -> Mapping[str, ClassValues]:
    """Class → label value, without the background."""
    names = read_description(path, "training").get("labels", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise bad_labels(path)
    values = {name: label_value(path, value) for value, name in names.items()}
    return {plain(name): value for name, value in values.items() if value}


def label_value(path: Path, value: Any) -> int:
    """A label value of ``dataset.json``.

    Raises:
        FlapsamError: it is not a whole number from 0 on.
    """
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise bad_labels(path)
    return int(text)


def bad_labels(path: Path) -> FlapsamError:
    """The error for 'labels' that are not names with whole numbers."""
    return FlapsamError(f"{path / DESCRIPTION}: 'labels' must give each class a name and a whole number; correct it")


def _numbered(folder: Path, name: str) -> list[Path]:
    """The files of a case with one file per modality."""
    pattern = re.compile(rf"{re.escape(name)}_[0-9]{{4}}\.nii\.gz")
    return sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name)) if exists(folder / ".") else []


def read_description(path: Path, wanted: str) -> dict[str, Any]:
    """Read ``dataset.json``, which must have the key ``wanted``.

    Raises:
        FlapsamError: the file cannot be read, is not valid JSON, or lacks the key.
    """
    file = path / DESCRIPTION
    try:
        description = json.loads(read_text(file))
    except OSError as error:
        raise FlapsamError(f"{file}: cannot be read ({error.strerror}); the layouts msd and nnunet need it") from error
    except (ValueError, RecursionError) as error:
        raise FlapsamError(f"{file}: not valid JSON ({error}); fix or restore the file") from error
    if not isinstance(description, dict) or wanted not in description:
        raise FlapsamError(f"{file}: the key '{wanted}' is missing; add it or choose another data.layout")
    return description


def glance(path: Path) -> dict[str, Any]:
    """The contents of ``dataset.json``, or an empty dictionary if it is missing or cannot be read."""
    try:
        description = json.loads(read_text(path / DESCRIPTION))
    except (FlapsamError, OSError, ValueError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}


def plain(name: str) -> str:
    """A class name as configurations write it, in lower case and with underscores."""
    return name.strip().lower().replace(" ", "_")


DATASET = Dataset(
    name="msd",
    read=read,
    recognises=lambda path: isinstance(glance(path).get("training"), list),
    labels=labels,
    layout="dataset.json, imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz",
    sites="one; simulate more with data.simulated_sites, or assign cases to sites with data.table",
)
