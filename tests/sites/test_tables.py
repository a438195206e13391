"""Tables of cases and sites as spreadsheets and editors write them: read if they can mean one thing only."""

from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.run.config import Data
from flapsam.sites import Case, CaseList, list_cases, read_found
from flapsam.sites.near import near
from flapsam.sites.table import read_table
from tests.helpers.command import flapsam
from tests.helpers.sites import make_sites, small_pair

ROWS = [("001", "a", "train"), ("002", "a", "train"), ("003", "a", "val"), ("010", "a", "test")]
PLAIN = "case,site,split\n001,a,train\n002,a,train\n003,a,val\n010,a,test\n"
READ: dict[str, bytes] = {
    "as it should be": PLAIN.encode(),
    "semicolons": PLAIN.replace(",", ";").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "bars": PLAIN.replace(",", " | ").encode(),
    "Excel's line about the separator": b"sep=;\r\n" + PLAIN.replace(",", ";").encode(),
    "Unicode text of Excel": PLAIN.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "UTF-16, most significant byte first": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "UTF-16 without a byte order mark": PLAIN.encode("utf-16-le"),
    "a byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "line ends of an old Mac": PLAIN.replace("\n", "\r").encode(),
    "blanks around cells": PLAIN.replace(",", "\u00a0, ").replace("\n", " \n").encode(),
    "quotation marks": "".join(",".join(f'"{cell}"' for cell in row.split(",")) + "\n" for row in PLAIN.split()).encode(),
    "formulas that keep zeros": PLAIN.replace("001", '="001"').encode(),
    "empty rows": (PLAIN.replace("\n", "\n\n", 2) + ",,\r\n\r\n,,\r\n").encode(),
    "an empty row above the header": b",,\n" + PLAIN.encode(),
    "empty columns": PLAIN.replace("\n", ",,\n").encode(),
    "no end of the last line": PLAIN.strip().encode(),
    "capitals": PLAIN.replace("case,site,split", "Case,SITE,Split").replace("train", "Train").encode(),
    "columns of the user's own, in another order": (
        b'notes,split,case,site\n,train,001,a\n"old, but good",train,002,a\n,val,003,a\n,test,010,a\n'
    ),
}


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_a_table_of_a_spreadsheet_is_read(content: bytes, tmp_path: Path):
    table = tmp_path / "sites.csv"
    table.write_bytes(content)
    assert [(row.case, row.site, row.split) for row in read_table(table)] == ROWS


REFUSED: dict[str, tuple[bytes, str]] = {
    "a note in the last row": ((PLAIN + "checked by hand\n").encode(), ", line 6: it has no site, only 'checked by hand'"),
    "a comma in a name": (
        (PLAIN + "011,a,train,p1,p2\n").encode(),
        ", line 6: it has 5 cells, the header 3; remove what is too much, or quote a comma",
    ),
    "a decimal comma": ((PLAIN + "1,5,a,train\n").encode(), ", line 6: it has 4 cells, the header 3"),
    "rows within quotation marks": (
        b'"case,site"\n"001,a"\n',
        ": column case, site is missing; .*its first line is 'case,site'",
    ),
    "a title": (b"Our sites\ncase,site\n001,a\n", ": column case, site is missing; .*its first line is 'Our sites'"),
    "an open quotation mark": (b'case,site\n"001,a\n002,a\n', ": cannot be read as CSV: line 3, unexpected end of data"),
    "a workbook": (b"PK\x03\x04\x14\x00\x06\x00", ": this is a workbook or an archive, not text; save it as text in UTF-8"),
    "letters of Windows": (
        "case,site\n001,Z\u00fcrich\n".encode("cp1252"),
        ", line 2: byte 0xfc is not text in UTF-8; save the file as UTF-8",
    ),
    "zero bytes": (PLAIN.encode() + b"\0\0\0", ", line 6: a zero byte is not text"),
    "a column twice": (b"case,site,Case\n001,a,002\n", ": column case is there twice"),
    "another word for subject": (b"case,site,subjects\n001,a,p\n", ": column 'subjects' is unknown; call it subject"),
    "another word for test": (
        PLAIN.replace("test", "testing").encode(),
        ", line 5: case 010 has the unknown split 'testing'",
    ),
    "the same case with a blank": (b"case,site\n001,a\n001 ,a\n", ", line 3: at site a, case '001' is listed twice"),
    "a name with a zero width space": (b"case,site\n001\xe2\x80\x8b,a\n", ", line 2, case: '001.u200b' cannot be a name"),
    "rows that are all empty": (b"case,site\n,\n,\n", ": there are no rows below the header"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_could_mean_something_else_is_refused_with_its_line(content: bytes, message: str, tmp_path: Path):
    table = tmp_path / "sites.csv"
    table.write_bytes(content)
    with pytest.raises(FlapsamError, match=r"sites\.csv" + message) as error:
        read_table(table)
    assert "\n" not in str(error.value)


NAMES = ["001", "ct_007", "20", "020", "ward 3"]
NEAR = {
    "1": "001",
    "1.0": "001",
    "001.nii.gz": "001",
    "001_0000": "001",
    "CT-7": "ct_007",
    "ct 07": "ct_007",
    "Ward_03": "ward 3",
    "11": None,
    "100": None,
    # Two names are equally near.
    "0020": None,
}


@pytest.mark.parametrize(("name", "meant"), NEAR.items())
def test_a_name_that_a_program_has_changed_is_recognised(name: str, meant: str | None):
    assert near(name, NAMES) == meant


def test_lost_zeros_are_one_sentence_a_row(tmp_path: Path):
    for case in ("001", "010"):
        small_pair(tmp_path / "a", case)
    small_pair(tmp_path / "b", "7")
    (tmp_path / "sites.csv").write_text("case,site\n1,a\n010,a\n7,a\n7,B\nghost,a\n")
    table = tmp_path / "sites.csv"
    found = list_cases(tmp_path)
    assert [case.name for case in found.cases] == ["010"]
    assert found.problems[:3] == [
        f"{table}, line 2: at site a, there is no case 1, but 001; correct the table (spreadsheets drop zeros)",
        f"{table}, line 4: case 7 is not at site a, but at b; correct one",
        f"{table}, line 5: there is no site B, but b; make table and folder agree",
    ]
    assert [problem.split(": ")[1] for problem in found.problems[3:]] == [
        "the image of case ghost of site a is missing; add it or remove the case from sites.csv",
        "the label map of case ghost of site a is missing; add it or remove the case from sites.csv",
    ]


def test_a_table_for_data_without_sites_says_what_a_row_means(tmp_path: Path):
    def case(name: str, site: str = "all") -> Case:
        return Case(name, site, name, tmp_path / site / f"{name}.nii.gz", tmp_path / "label.nii.gz")

    table = tmp_path / "who.csv"
    table.write_text("case;site\n1;x\n002;x\n002;y\n003;b\n003;c\n")
    found = CaseList([case("001"), case("002"), case("003", "a"), case("003", "b")], [])
    data = Data(path=tmp_path, labels={"a": 1}, table=table)
    sites, problems = read_found(data, 0, found)
    assert [(site.name, [c.image.parent.name for c in site.cases]) for site in sites] == [("b", ["b"]), ("x", ["all"])]
    assert problems == [
        f"{table}, line 2: case 1 is not in the data, but 001 is; correct the table (spreadsheets drop zeros)",
        f"{table}, line 4: case 002 is in line 3, too; a case belongs to one site, so remove a row",
        f"{table}, line 6: case 003 is at several sites (a, b), but not at c; rename the cases",
    ]


@pytest.mark.parametrize("name", ["sites.xlsx", "Sites.ods", "sites.csv.txt", "sites.tsv"])
def test_a_table_under_another_name_is_not_passed_over(name: str, tmp_path: Path):
    small_pair(tmp_path / "a", "001")
    (tmp_path / name).write_bytes(b"case,site\n001,a\n")
    with pytest.raises(FlapsamError, match=r"the table of the sites must be called sites\.csv; save it as CSV"):
        list_cases(tmp_path)
    (tmp_path / name).rename(tmp_path / "SITES.CSV")
    assert [case.site for case in list_cases(tmp_path).cases] == ["a"]
    (tmp_path / "SITES.CSV").write_bytes(b"case,site\n002,a\n")
    assert len(list_cases(tmp_path).problems) == 2


def test_data_check_reads_a_table_with_semicolons(tmp_path: Path, capfd):
    make_sites(tmp_path, sites=1, cases=3)
    (tmp_path / "sites.csv").write_bytes("Case;Site\r\nsite_0_0;site_0\r\nsite_0_1;site_0\r\n;\r\n".encode("utf-16"))
    outcome = flapsam(capfd, "data", "check", tmp_path)
    assert (outcome.code, "2 cases at 1 sites, 0 problems" in outcome.out) == (0, True)
