"""The plain layout: one folder a site.

``SITE/images/CASE.nii.gz`` with ``SITE/labels/CASE.nii.gz``, or for one site alone the same without ``SITE``; and optionally
``sites.csv`` beside them with columns ``case,site`` and, if wanted, ``split`` (train, val, test) and ``subject``. Where the
table is present, only the cases in it are used.
"""

from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.sites.case import CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.table import Row, found_by, read_table
from flapsam.volumes import case_name, is_nifti

TABLE = "sites.csv"


def read(path: Path) -> CaseList:
    """All cases of the data set.

    Raises:
        FlapsamError: no site folder, or a table that cannot be read.
    """
    images, labels = _files(path, "images"), _files(path, "labels")
    if not images:
        raise FlapsamError(f"{path}: no SITE/images/CASE.nii.gz found; put one folder a site there")
    table = path / TABLE
    rows = read_table(table) if table.exists() else [{"site": site, "case": name} for site, name in images]

    def files(row: Row) -> tuple[Path, Path]:
        place, folder = (row["site"], row["case"]), path if _is_one_site(path) else path / row["site"]
        name = f"{row['case']}.nii.gz"
        return images.get(place) or folder / "images" / name, labels.get(place) or folder / "labels" / name

    found = found_by(rows, files, f"{TABLE} names it" if table.exists() else "add it or leave the image out")
    unused = [] if table.exists() else [labels[place] for place in labels if place not in images]
    return CaseList(
        found.cases, [*found.problems, *(f"{label}: its image is missing; add it or remove this" for label in unused)]
    )


def _files(path: Path, folder: str) -> dict[tuple[str, str], Path]:
    """Site and case → file."""
    parts = [part for part in (path / folder,) if part.is_dir()] if _is_one_site(path) else sorted(path.glob(f"*/{folder}"))
    found = (file for part in parts for file in sorted(part.iterdir()) if is_nifti(file))
    return {(file.parent.parent.name, case_name(file)): file for file in found}


def _is_one_site(path: Path) -> bool:
    return (path / "images").is_dir()


DATASET = Dataset(
    name="folders",
    read=read,
    recognises=lambda path: _is_one_site(path) or any(path.glob("*/images")),
    layout="SITE/images/CASE.nii.gz, SITE/labels/CASE.nii.gz, optionally sites.csv",
    sites="one folder each",
)
