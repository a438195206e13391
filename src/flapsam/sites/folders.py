"""The plain layout: one folder per site.

Every case has ``SITE/images/CASE.nii.gz`` and ``SITE/labels/CASE.nii.gz``. Data of a single site may leave out ``SITE``. An
optional ``sites.csv`` beside them has the columns ``case,site`` and, if known, ``split`` (train, val, test) and ``subject``.
If that table exists, only its cases are used. Names of images may have nnU-Net's number, with a file for each modality:
``SITE/images/CASE_0000.nii.gz``, ``SITE/images/CASE_0001.nii.gz``, …
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.names import clash, spelling
from flapsam.sites.case import CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.near import near
from flapsam.sites.numbered import gaps, numbered
from flapsam.sites.table import Row, found_by, read_table
from flapsam.volumes import case_name, is_nifti

TABLE = "sites.csv"
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".tsv", ".txt", ".csv")
"""Suffixes of files that are meant as the table, if they are called as it is."""

Key = tuple[str, str]
"""A site and a case."""


def read(path: Path) -> CaseList:
    """Read all cases of the folder, or those in ``sites.csv``.

    Raises:
        FlapsamError: there are no images, two files have the same name, or the table is wrong.
    """
    labels = _files(path, "labels")
    images = _by_case(_files(path, "images"), labels)
    if not images:
        raise FlapsamError(
            f"{path}: no SITE/images/CASE.nii.gz found; create one folder per site, with images and labels in it"
        )
    table = _table(path)
    rows = read_table(table) if table else [Row(case=name, site=site) for site, name in images]

    def files(row: Row) -> tuple[Path, Path]:
        key, folder = (row.site, row.case), path if _is_one_site(path) else path / row.site
        name = f"{row.case}.nii.gz"
        return images.get(key, [folder / "images" / name])[0], labels.get(key) or folder / "labels" / name

    def hint(row: Row) -> str | None:
        meant = _meant(row, images.keys() | labels.keys()) if table else None
        return f"{table}, line {row.line}: {meant}" if meant else None

    advice = f"add it or remove the case from {TABLE}" if table else "add it or leave the image out"
    listed = found_by(rows, files, advice, hint)
    cases = [replace(case, other_images=tuple(images[case.site, case.name][1:])) for case in listed.cases]
    unused = [] if table else [label for key, label in labels.items() if key not in images]
    problems = [f"{label}: this label map has no image; add the image or remove the label map" for label in unused]
    return CaseList(cases, [*listed.problems, *(gap for case in cases for gap in gaps(case)), *problems])


def _table(path: Path) -> Path | None:
    """The table, in whatever letter case its name is."""
    there = [file for file in sorted(path.iterdir()) if file.name.casefold().startswith("sites.") and file.is_file()]
    for file in there:
        if file.name.casefold() == TABLE:
            return file
    for file in there:
        if file.suffix.casefold() in SPREADSHEETS:
            raise FlapsamError(
                f"{file}: the table of the sites must be called {TABLE}; save it as CSV, or rename what is none"
            )
    return None


def _meant(row: Row, keys: Iterable[Key]) -> str | None:
    """What a row probably means, whose case has no file."""
    at_site: dict[str, list[str]] = {}
    for site, name in keys:
        at_site.setdefault(site, []).append(name)
    if row.site not in at_site:
        site = near(row.site, at_site)
        return f"there is no site {row.site}, but {site}; make table and folder agree" if site else None
    if other := near(row.case, at_site[row.site]):
        return f"at site {row.site}, there is no case {row.case}, but {other}; correct the table (spreadsheets drop zeros)"
    elsewhere = sorted(site for site, names in at_site.items() if row.case in names)
    return f"case {row.case} is not at site {row.site}, but at {', '.join(elsewhere)}; correct one" if elsewhere else None


def _by_case(images: dict[Key, Path], labels: dict[Key, Path]) -> dict[Key, list[Path]]:
    """The image files of every case, one for each modality.

    A number at the end of a name counts as nnU-Net's if there is a label map without the number and none with it.
    """
    cases: dict[Key, list[Path]] = {}
    for (site, name), image in images.items():
        base = numbered(name)
        key = (site, base) if base and (site, base) in labels and (site, name) not in labels else (site, name)
        cases.setdefault(key, []).append(image)
    return cases


def _files(path: Path, folder: str) -> dict[Key, Path]:
    """Files in every site's ``folder`` (images or labels), by site and case."""
    parts = [path / folder] if _is_one_site(path) else sorted(path.glob(f"[!.]*/{folder}"))
    files: dict[Key, Path] = {}
    for file in (file for part in parts if part.is_dir() for file in sorted(part.iterdir()) if is_nifti(file)):
        # A path such as "." has no name of its own.
        key = spelling(file.parent.parent.absolute().name), spelling(case_name(file))
        if key in files:
            raise FlapsamError(f"{file}: {clash(case_name(files[key]), case_name(file))}")
        files[key] = file
    return files


def _is_one_site(path: Path) -> bool:
    return (path / "images").is_dir()


DATASET = Dataset(
    name="folders",
    read=read,
    recognises=lambda path: _is_one_site(path) or any(path.glob("*/images")),
    layout="SITE/images/CASE.nii.gz, SITE/labels/CASE.nii.gz, optionally sites.csv",
    sites="one folder per site",
)
