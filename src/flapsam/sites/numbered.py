"""nnU-Net's names of images: ``CASE_0000``, ``CASE_0001``, …, one file for each modality of a case."""

import re

from flapsam.sites.case import Case
from flapsam.volumes import case_name

NUMBERED = re.compile(r"(.+)_(\d{4})")


def numbered(name: str) -> str | None:
    """The case's name in a file's name that ends in a modality's number. None if it does not."""
    match = NUMBERED.fullmatch(name)
    return match[1] if match else None


def gaps(case: Case) -> list[str]:
    """A sentence if a case's files are numbered, but not from 0000 without a gap: one modality would pass for another."""
    names = [case_name(image) for image in case.images]
    if any(numbered(name) != case.name for name in names):
        return []
    expected = [f"{case.name}_{number:04d}" for number in range(len(names))]
    if names == expected:
        return []
    return [
        f"{case.image}: case {case.name} has the files {', '.join(names)}, but modalities count from _0000; add the missing"
    ]
