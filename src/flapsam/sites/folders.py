"""The plain layout: one folder per site.

Every case has ``SITE/images/CASE.nii.gz`` and ``SITE/labels/CASE.nii.gz``. Data of a single site may leave out ``SITE``. An
optional ``sites.csv`` beside them has the columns ``case,site`` and, if known, ``split`` (train, val, test) and ``subject``.
If that table exists, only its cases are used.
"""

from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.names import clash, spelling
from flapsam.sites.case import CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.table import Row, found_by, read_table
from flapsam.volumes import case_name, is_nifti

TABLE = "sites.csv"


def read(path: Path) -> CaseList:
    """Read all cases of the folder, or those in ``sites.csv``.

    Raises:
        FlapsamError: there are no images, two files have the same name, or the table is wrong.
    """
    images, labels = _files(path, "images"), _files(path, "labels")
    if not images:
        raise FlapsamError(
            f"{path}: no SITE/images/CASE.nii.gz found; create one folder per site, with images and labels in it"
        )
    table = path / TABLE
    rows = read_table(table) if table.exists() else [{"site": site, "case": name} for site, name in images]

    def files(row: Row) -> tuple[Path, Path]:
        key, folder = (row["site"], row["case"]), path if _is_one_site(path) else path / row["site"]
        name = f"{row['case']}.nii.gz"
        return images.get(key) or folder / "images" / name, labels.get(key) or folder / "labels" / name

    advice = f"add it or remove the case from {TABLE}" if table.exists() else "add it or leave the image out"
    listed = found_by(rows, files, advice)
    unused = [] if table.exists() else [label for key, label in labels.items() if key not in images]
    problems = [f"{label}: this label map has no image; add the image or remove the label map" for label in unused]
    return CaseList(listed.cases, [*listed.problems, *problems])


def _files(path: Path, folder: str) -> dict[tuple[str, str], Path]:
    """Files in every site's ``folder`` (images or labels), by site and case."""
    parts = [path / folder] if _is_one_site(path) else sorted(path.glob(f"[!.]*/{folder}"))
    files: dict[tuple[str, str], Path] = {}
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
