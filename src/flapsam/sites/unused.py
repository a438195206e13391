"""Files of a data set that no case uses, each with the reason."""

import os
from collections.abc import Iterable
from pathlib import Path

from flapsam.sites.case import Case
from flapsam.volumes import LeftOut, is_dicom, is_hidden, is_image, is_nifti, reason_of

OWN = ("sites.csv", "dataset.json", "run.yaml")
"""Files that describe data sets and runs, in lower case."""


def unused(path: Path, cases: Iterable[Case]) -> list[LeftOut]:
    """List the files that no case uses, and the folders without any file of a case.

    Args:
        path: the data's folder.
        cases: the cases that were found in it.
    """
    used = {file.resolve() for case in cases for file in (*case.images, case.label)}
    holding = {parent for file in used for parent in file.parents}
    left_out: list[LeftOut] = []
    for directory, folders, files in os.walk(path, followlinks=True):
        folder = Path(directory)
        if folder.resolve() not in holding:
            folders.clear()
            # If the data's own folder has no case, there is nothing to compare its files with.
            if folder != path:
                left_out.append(LeftOut(folder, "a folder without a case"))
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (folder / name for name in sorted(files)):
            if file.resolve() not in used and not is_hidden(file) and file.name.casefold() not in OWN:
                left_out.append(LeftOut(file, _reason(file)))
    return left_out


def _reason(file: Path) -> str:
    if is_nifti(file):
        return "no case of the data set"
    if is_image(file):
        return "not NIfTI, which training needs; convert it to .nii.gz"
    if is_dicom(file):
        return "DICOM; convert it to NIfTI for training"
    return reason_of(file)
