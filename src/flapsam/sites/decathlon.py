"""Layout of the Medical Segmentation Decathlon (MSD), and of nnU-Net v1, which follows it.

``TaskNN_Name/dataset.json`` lists pairs of image and label map under ``training``, and maps label values to names under
``labels``. The decathlon stores several modalities along the fourth axis of one file. nnU-Net v1 stores one file per
modality, ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, …, and lists them without the number.
"""

import json
import re
from collections.abc import Iterable, Mapping
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line
from flapsam.base.files import exists, read_text
from flapsam.base.names import as_name, check_distinct
from flapsam.run.config import ClassValues
from flapsam.run.reading import validated
from flapsam.sites.case import Case, CaseList
from flapsam.sites.dataset import Dataset
from flapsam.volumes import case_name

DESCRIPTION = "dataset.json"
SITE = "all"
"""Name of the only site, since this layout does not say who holds which case."""

Part = TypeVar("Part", bound=BaseModel)


class Pair(BaseModel):
    """An image and its label map, as paths in the data's folder."""

    image: str
    label: str


class Training(BaseModel):
    """The key of ``dataset.json`` that lists the pairs."""

    training: list[Pair]


class Labels(BaseModel):
    """The key of ``dataset.json`` that names the classes."""

    labels: dict[int, str] = {}


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
        images = [image] if exists(image) else sorted(image.parent.glob(f"{escape(name)}_[0-9][0-9][0-9][0-9].nii.gz"))
        if images and exists(label):
            cases.append(Case(name, SITE, name, images[0], label, other_images=tuple(images[1:])))
        for there, file, kind in ((images, image, "image"), (exists(label), label, "label map")):
            if not there:
                problems.append(
                    f"{file}: the {kind} of case {name} is missing; add it or remove the case from {DESCRIPTION}"
                )
    return CaseList(sorted(cases, key=lambda case: case.name), problems)


def labels(path: Path) -> Mapping[str, ClassValues]:
    """Class → label value, without the background.

    Raises:
        FlapsamError: ``dataset.json`` cannot be read, or the name of a class is refused.
    """
    names = {value: name for value, name in read_description(path, Labels).labels.items() if value != 0}
    return dict(zip(class_names(path, names.values()), names, strict=True))


def read_description(path: Path, parts: type[Part]) -> Part:
    """Read ``dataset.json``.

    Args:
        path: the data's folder.
        parts: model of the keys that the layout reads. Other keys are ignored.

    Raises:
        FlapsamError: the file cannot be read, is not valid JSON, lacks a key or has a wrong value for it.
    """
    file = path / DESCRIPTION
    try:
        description = json.loads(read_text(file))
    except OSError as error:
        raise FlapsamError(f"{file}: cannot be read ({error.strerror}); the layouts msd and nnunet need it") from error
    except (ValueError, RecursionError) as error:
        raise FlapsamError(f"{file}: not valid JSON ({error}); fix or restore the file") from error
    return validated(description, parts, str(file))


def place(path: Path, file: str, entry: str) -> Path:
    """The file that an entry of ``dataset.json`` names.

    Args:
        path: the data's folder.
        file: the file's path, absolute or relative to the folder.
        entry: the entry, for the error message.

    Raises:
        FlapsamError: the path leads out of the data's folder, or cannot be one.
    """
    target = path / file
    roots = (path, path.absolute(), path.resolve())
    if ".." in Path(file).parts or not file.isprintable() or not any(target.is_relative_to(root) for root in roots):
        raise FlapsamError(
            f"{entry}: '{one_line(file[:200])}' is not a path inside the data's folder; move the file there or correct it"
        )
    try:
        target.exists()
    except OSError as error:
        raise FlapsamError(f"{entry}: '{file[:200]}' cannot be used ({error.strerror}); correct it") from error
    return target


def glance(path: Path) -> dict[str, Any]:
    """The contents of ``dataset.json``, or an empty dictionary if it is missing or cannot be read."""
    try:
        description = json.loads(read_text(path / DESCRIPTION))
    except (FlapsamError, OSError, ValueError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}


def class_names(path: Path, names: Iterable[str]) -> list[str]:
    """Class names as configurations write them: in lower case, with underscores in place of spaces and slashes.

    Args:
        path: the data's folder.
        names: the names in ``dataset.json``.

    Raises:
        FlapsamError: a name is refused, or two are the same.
    """
    where = f"{path / DESCRIPTION}, labels"
    plain = [as_name(re.sub(r"[ /\\]", "_", name.strip().lower()), where) for name in names]
    check_distinct(plain, where)
    return plain


DATASET = Dataset(
    name="msd",
    read=read,
    recognises=lambda path: isinstance(glance(path).get("training"), list),
    labels=labels,
    layout="dataset.json, imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz",
    sites="one; simulate more with data.simulated_sites, or assign cases to sites with data.table",
)
