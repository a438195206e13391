"""The plain layout: one folder a site.

``SITE/images/CASE.nii.gz`` with ``SITE/labels/CASE.nii.gz``, and optionally ``sites.csv`` beside the site folders with
columns ``case,site`` and, if wanted, ``split`` (train, val, test) and ``subject``. Where the table is present, only the
cases in it are used.
"""

import csv
from pathlib import Path
from typing import Any, get_args

from flapsam.errors import FlapsamError
from flapsam.sites.case import Case, Split
from flapsam.volumes import case_name, is_nifti

TABLE = "sites.csv"


def read(path: Path) -> list[Case]:
    """All cases of the data set, in the order of site and name.

    Raises:
        FlapsamError: no site folder, an image without its label, or a table that does not fit the files.
    """
    images = {
        (folder.parent.name, case_name(image)): image
        for folder in sorted(path.glob("*/images"))
        for image in sorted(folder.iterdir())
        if is_nifti(image)
    }
    if not images:
        raise FlapsamError(f"{path}: no SITE/images/CASE.nii.gz found; put one folder a site there")
    table = path / TABLE
    rows: list[dict[str, Any]] = (
        _read_table(table) if table.exists() else [{"site": site, "case": name} for site, name in images]
    )
    cases = []
    for row in rows:
        site, name = row["site"], row["case"]
        image = images.get((site, name))
        if image is None:
            raise FlapsamError(f"{table}: case {name} of site {site} has no image {site}/images/{name}.nii.gz")
        cases.append(
            Case(
                name=name,
                site=site,
                subject=row.get("subject") or name,
                image=image,
                label=_label_of(image, name),
                split=row.get("split") or None,
            )
        )
    return sorted(cases, key=lambda case: (case.site, case.name))


def _label_of(image: Path, name: str) -> Path:
    folder = image.parent.parent / "labels"
    for candidate in (folder / f"{name}.nii.gz", folder / f"{name}.nii"):
        if candidate.exists():
            return candidate
    raise FlapsamError(f"{image}: its label map {folder / name}.nii.gz is missing; add it or leave the image out")


def _read_table(table: Path) -> list[dict[str, Any]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FlapsamError(f"{table}: cannot be read as CSV") from error
    missing = {"case", "site"} - set(rows[0] if rows else ())
    if missing:
        raise FlapsamError(
            f"{table}: column {', '.join(sorted(missing))} is missing; case,site[,split,subject] are expected"
        )
    seen = set()
    for row in rows:
        key = (row["site"], row["case"])
        if key in seen:
            raise FlapsamError(f"{table}: case {key[1]} of site {key[0]} stands in two rows; remove one")
        seen.add(key)
        if row.get("split") and row["split"] not in get_args(Split):
            raise FlapsamError(f"{table}: split of case {key[1]} is '{row['split']}'; use train, val or test")
    return rows
