"""Tables that assign cases to sites, with the columns ``case,site`` and optionally ``split`` and ``subject``.

They are read as spreadsheets write them: separated by commas, semicolons, tabs or bars, in UTF-8 or UTF-16, with blanks
around the cells, empty rows and empty columns.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line
from flapsam.base.files import exists
from flapsam.base.names import as_name, check_distinct, clash, folded
from flapsam.base.text import read_document
from flapsam.run.config import SPLITS, Split
from flapsam.sites.case import Case, CaseList

SHIPPED = Path(__file__).parent / "tables"
"""Folder of the tables that ship with flapsam."""
REQUIRED, OPTIONAL = ("case", "site"), ("split", "subject")
SEPARATORS = ",;\t|"
SHOWN = 60
"""Number of characters of a row that a message shows."""


@dataclass(frozen=True)
class Row:
    """A row of a table: a case, the site that holds it, and what else the table says."""

    case: str
    site: str
    split: Split | None = None
    subject: str = ""
    """Empty if the table names none."""
    line: int = 0
    """Number of the row's last line in the file, which an editor shows."""


def read_table(table: Path) -> list[Row]:
    """Read the rows of a table. Empty rows do not count.

    Raises:
        FlapsamError: the file is not CSV, a column is missing, a case or a site has no valid name, a case is listed twice,
            or a split is unknown.
    """
    try:
        (_, header), *numbered = _cells(read_document(table)) or [(0, [])]
    except OSError as error:
        raise FlapsamError(f"{table}: cannot be read ({error.strerror}); check the path") from error
    except csv.Error as error:
        raise FlapsamError(f"{table}: cannot be read as CSV: {error}; check the quotation marks there") from error
    columns = _columns(table, header)
    if not numbered:
        raise FlapsamError(f"{table}: there are no rows below the header; add a row for each case")
    rows = [_row(table, line, cells, columns, len(header)) for line, cells in numbered]
    seen: dict[tuple[str, str], str] = {}
    for row in rows:
        key = (folded(row.site), folded(row.case))
        if key in seen:
            raise FlapsamError(f"{table}, line {row.line}: at site {row.site}, case {clash(seen[key], row.case)}")
        seen[key] = row.case
    check_distinct(dict.fromkeys(row.site for row in rows), f"{table}, column site")
    return rows


def found_by(
    rows: Sequence[Row],
    files: Callable[[Row], tuple[Path, Path]],
    reason: str,
    hint: Callable[[Row], str | None] = lambda row: None,
) -> CaseList:
    """Find the cases that a table lists.

    Args:
        rows: the rows that ``read_table`` returns.
        files: returns the image and the label map of a row, whether these files exist or not.
        reason: end of the sentence about a missing file, saying what to do.
        hint: returns a sentence about a row without any file if it is known what the row means. It replaces the others.

    Returns:
        The cases with both files, and one problem for each missing file.
    """
    cases, problems = [], []
    for row in rows:
        image, label = files(row)
        there = exists(image), exists(label)
        if all(there):
            cases.append(Case(row.case, row.site, row.subject or row.case, image, label, row.split))
        elif not any(there) and (meant := hint(row)):
            problems.append(meant)
        else:
            for path, kind, present in zip((image, label), ("image", "label map"), there, strict=True):
                if not present:
                    problems.append(f"{path}: the {kind} of case {row.case} of site {row.site} is missing; {reason}")
    return CaseList(sorted(cases, key=lambda case: (case.site, case.name)), problems)


def _cells(text: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with its line and its cells, without the blanks around them."""
    first, _, rest = text.partition("\n")
    # Excel writes and understands such a line.
    named = re.fullmatch(r'"?sep=(.)"?', first.strip(" \r"), re.IGNORECASE)
    body = "\n" + rest if named else text
    return [(line, cells) for line, cells in _read(body, named[1] if named else _separator(text)) if any(cells)]


def _read(body: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=separator, strict=True)
    try:
        for cells in reader:
            # A cell such as ="001" keeps its zeros in a spreadsheet.
            yield reader.line_num, [re.sub(r'^="(.*)"$', r"\1", cell.strip()).strip() for cell in cells]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}, {error}") from error


def _separator(text: str) -> str:
    """The separator by which the first line that is not empty has the required columns. A comma if there is none."""
    header = next((line for line in text.splitlines() if line.strip(f"{SEPARATORS} ")), "")
    for separator in SEPARATORS:
        names = {cell.strip(' "').casefold() for cell in header.split(separator)}
        if names.issuperset(REQUIRED):
            return separator
    return ","


def _columns(table: Path, header: Sequence[str]) -> dict[str, int]:
    """Where the columns are that flapsam reads. Other columns are the user's own."""
    names = [name.casefold() for name in header]
    missing = [column for column in REQUIRED if column not in names]
    if missing:
        written = f", but its first line is '{_shown(header)}'" if header else ""
        raise FlapsamError(
            f"{table}: column {', '.join(missing)} is missing; the columns are case,site[,split,subject]{written}"
        )
    for column in (*REQUIRED, *OPTIONAL):
        if names.count(column) > 1:
            raise FlapsamError(f"{table}: column {column} is there twice; rename or remove one")
        near = get_close_matches(column, names, n=1, cutoff=0.8)
        if near and near != [column]:
            raise FlapsamError(
                f"{table}: column '{_shown(near)}' is unknown; call it {column}, or rename it if it is not that"
            )
    return {column: names.index(column) for column in (*REQUIRED, *OPTIONAL) if column in names}


def _row(table: Path, line: int, cells: Sequence[str], columns: dict[str, int], width: int) -> Row:
    where = f"{table}, line {line}"
    if any(cells[width:]):
        raise FlapsamError(
            f"{where}: it has {len(cells)} cells, the header {width}; remove what is too much, or quote a comma"
        )
    cell = {column: cells[index] if index < len(cells) else "" for column, index in columns.items()}
    for column in REQUIRED:
        if not cell[column]:
            raise FlapsamError(
                f"{where}: it has no {column}, only '{_shown(cells)}'; give it a case and a site, or remove it"
            )
    split = cell.get("split", "").casefold()
    if split and split not in SPLITS:
        raise FlapsamError(
            f"{where}: case {one_line(cell['case'][:SHOWN])} has the unknown split '{_shown([cell['split']])}'; "
            "use train, val or test"
        )
    return Row(
        case=as_name(cell["case"], f"{where}, case"),
        site=as_name(cell["site"], f"{where}, site"),
        split=cast(Split, split) if split else None,
        subject=cell.get("subject", ""),
        line=line,
    )


def _shown(cells: Sequence[str]) -> str:
    return one_line(",".join(cells).rstrip(",")[:SHOWN])
