"""Tables that say who holds which case: columns ``case,site`` and, if wanted, ``split`` and ``subject``."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flapsam.base.errors import FlapsamError
from flapsam.run.config import SPLITS
from flapsam.sites.case import Case, CaseList

SHIPPED = Path(__file__).parent / "tables"

Row = dict[str, Any]


def read_table(table: Path) -> list[Row]:
    """The rows of a table.

    Raises:
        FlapsamError: it is no CSV, a column is missing, a case stands there twice, or a split is none.
    """
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
        if row.get("split") and row["split"] not in SPLITS:
            raise FlapsamError(f"{table}: split of case {key[1]} is '{row['split']}'; use train, val or test")
    return rows


def found_by(rows: Sequence[Row], files: Callable[[Row], tuple[Path, Path]], reason: str) -> CaseList:
    """The cases of a table's rows.

    Args:
        rows: of ``read_table``.
        files: a row's image and label map, whether they are there or not.
        reason: ends the sentence that says which file is missing.
    """
    cases, problems = [], []
    for row in rows:
        image, label = files(row)
        for path, kind in ((image, "image"), (label, "label map")):
            if not path.exists():
                problems.append(f"{path}: the {kind} of case {row['case']} of site {row['site']} is missing; {reason}")
        if image.exists() and label.exists():
            split = row.get("split") or None
            cases.append(Case(row["case"], row["site"], row.get("subject") or row["case"], image, label, split))
    return CaseList(sorted(cases, key=lambda case: (case.site, case.name)), problems)
