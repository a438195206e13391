"""Tables that assign cases to sites, with the columns ``case,site`` and optionally ``split`` and ``subject``."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line
from flapsam.base.files import exists, read_text
from flapsam.base.names import as_name, check_distinct, clash, folded
from flapsam.run.config import SPLITS
from flapsam.sites.case import Case, CaseList

SHIPPED = Path(__file__).parent / "tables"
"""Folder of the tables that ship with flapsam."""

Row = dict[str, Any]


def read_table(table: Path) -> list[Row]:
    """Read the rows of a table.

    Raises:
        FlapsamError: the file is not CSV, a column is missing, a case or a site has no valid name, a case is listed twice,
            or a split is unknown.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(table, "utf-8-sig"), newline=""))
        # The number of a row's last line, which an editor shows.
        numbered = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FlapsamError(f"{table}: cannot be read as CSV; check that the file exists and is UTF-8 text") from error
    rows = [row for _, row in numbered]
    missing = {"case", "site"} - set(reader.fieldnames or ())
    if missing:
        raise FlapsamError(
            f"{table}: column {', '.join(sorted(missing))} is missing; the columns are case,site[,split,subject]"
        )
    if not rows:
        raise FlapsamError(f"{table}: there are no rows below the header; add a row for each case")
    for number, row in numbered:
        # A row with too many cells has them under None, and one with too few has None in them.
        if None in row or not row["case"] or not row["site"]:
            raise FlapsamError(f"{table}: line {number} has a cell too few or too many; give it a case and a site")
    seen: dict[tuple[str, str], str] = {}
    for number, row in numbered:
        for column in ("case", "site"):
            row[column] = as_name(row[column] or "", f"{table}, line {number}, {column}")
        key = (folded(row["site"]), folded(row["case"]))
        if key in seen:
            raise FlapsamError(f"{table}, line {number}: at site {row['site']}, case {clash(seen[key], row['case'])}")
        seen[key] = row["case"]
        if row.get("split") and row["split"] not in SPLITS:
            split = one_line(row["split"][:20])
            raise FlapsamError(f"{table}: case {row['case']} has the unknown split '{split}'; use train, val or test")
    check_distinct(dict.fromkeys(row["site"] for row in rows), f"{table}, column site")
    return rows


def found_by(rows: Sequence[Row], files: Callable[[Row], tuple[Path, Path]], reason: str) -> CaseList:
    """Find the cases that a table lists.

    Args:
        rows: the rows that ``read_table`` returns.
        files: returns the image and the label map of a row, whether these files exist or not.
        reason: end of the sentence about a missing file, saying what to do.

    Returns:
        The cases with both files, and one problem for each missing file.
    """
    cases, problems = [], []
    for row in rows:
        image, label = files(row)
        for path, kind in ((image, "image"), (label, "label map")):
            if not exists(path):
                problems.append(f"{path}: the {kind} of case {row['case']} of site {row['site']} is missing; {reason}")
        if exists(image) and exists(label):
            split = row.get("split") or None
            cases.append(Case(row["case"], row["site"], row.get("subject") or row["case"], image, label, split))
    return CaseList(sorted(cases, key=lambda case: (case.site, case.name)), problems)
