"""Layout of nnU-Net v2: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz`` (a file per modality), ``labelsTr/CASE.nii.gz``.

If ``dataset.json`` has the key ``dataset``, the paths under it replace the two folders.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line
from flapsam.base.files import exists
from flapsam.base.names import Named
from flapsam.run.config import ClassValues
from flapsam.sites.case import Case, CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.decathlon import SITE
from flapsam.sites.description import DESCRIPTION, glance, place, read_description, values_by_name
from flapsam.sites.numbered import gaps, numbered
from flapsam.volumes import is_nifti


class Files(BaseModel):
    """The files of a case."""

    images: Annotated[list[str], Field(min_length=1)]
    label: str


class Description(BaseModel):
    """The keys of ``dataset.json`` that list the files."""

    file_ending: str
    channel_names: dict[str, Any] | list[Any] = {}
    dataset: Named[Files] | None = None


class Labels(BaseModel):
    """The key of ``dataset.json`` that names the classes."""

    labels: dict[str, Any]


def read(path: Path) -> CaseList:
    """Read all training cases as cases of one site.

    Raises:
        FlapsamError: ``dataset.json`` cannot be read, the files are not NIfTI, or a path leads out of the data's folder.
    """
    description = read_description(path, Description)
    ending = _ending(description.file_ending, path)
    listed: dict[str, tuple[list[Path], Path]] = {}
    problems: list[str] = []
    if description.dataset is not None:
        for name, files in description.dataset.items():
            listed[name] = [_place(path, image, name) for image in files.images], _place(path, files.label, name)
    else:
        for image in sorted(file for file in (path / "imagesTr").glob("*") if is_nifti(file)):
            name = numbered(image.name.removesuffix(ending)) if image.name.endswith(ending) else None
            if name is None:
                problems.append(f"{image}: images are called CASE_0000{ending}, one file for each modality; rename this one")
                continue
            listed.setdefault(name, ([], path / "labelsTr" / f"{name}{ending}"))[0].append(image)
    cases = []
    modalities = len(description.channel_names) or None
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
    problems += [gap for case in cases for gap in gaps(case)]
    return CaseList(cases, problems)


def labels(path: Path) -> Mapping[str, ClassValues]:
    """Class → label value or values, without the background but with ``ignore``.

    Raises:
        FlapsamError: ``dataset.json`` cannot be read, the name of a class is refused, or regions overlap, so that a value
            belongs to several classes.
    """
    classes: dict[str, ClassValues] = {}
    seen: set[int] = set()
    for name, values in values_by_name(read_description(path, Labels).labels, path).items():
        if seen & set(values):
            raise FlapsamError(
                f"{path / DESCRIPTION}: regions overlap; assign every label value to one class in data.labels"
            )
        seen |= set(values)
        classes[name] = values[0] if len(values) == 1 else values
    return classes


def _ending(written: str, path: Path) -> str:
    """The ending of the files' names, which people also write without its dot or with blanks around it."""
    ending = "." + written.strip().removeprefix(".")
    if ending.lower() not in (".nii.gz", ".nii"):
        shown = one_line(written[:20])
        raise FlapsamError(
            f"{path / DESCRIPTION}: the files end in {shown}, but flapsam reads NIfTI; convert them to .nii.gz"
        )
    return ending


def _place(path: Path, file: str, case: str) -> Path:
    # nnU-Net allows environment variables in these paths.
    return place(path, os.path.expandvars(file), f"{path / DESCRIPTION}, dataset, {case}")


DATASET = Dataset(
    name="nnunet",
    read=read,
    recognises=lambda path: {"channel_names", "file_ending"} <= glance(path).keys(),
    labels=labels,
    layout="dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz",
    sites="one; simulate more with data.simulated_sites, or assign cases to sites with data.table",
)
