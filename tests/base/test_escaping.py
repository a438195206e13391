"""Text from others, where it is shown: on a terminal, in a log, in CSV and in Markdown."""

import csv
import io
import logging
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from flapsam.adapters.card import model_card
from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import csv_cell, markdown, one_line
from flapsam.cli.console import show_error, warn
from flapsam.federation.engines.fit_process import OneLine
from flapsam.report.bench_table import _csv
from flapsam.run.ledger import Cohort, SiteJoined
from tests.helpers.adapters import trained

LINES = {
    "site Müller – 3 °C ✓": "site Müller – 3 °C ✓",
    "a\nError: forged": "a\\nError: forged",
    "\x1b[2J\r\t\x07": "\\x1b[2J\\r\\t\\x07",
    "a\u202eb\u2028": "a\\u202eb\\u2028",
    "\udc80": "\\udc80",
}


@pytest.mark.parametrize(("text", "expected"), LINES.items(), ids=ascii)
def test_text_stays_on_one_line(text: str, expected: str):
    assert one_line(text) == expected


def test_an_error_cannot_forge_another_line(capfd):
    show_error("x\x1b[31m\nError: y")
    warn("x\r\ny")
    assert capfd.readouterr().err == "Error: x\\x1b[31m\\nError: y\nx\\r\\ny\n"


def test_a_log_message_cannot_forge_another_line(tmp_path: Path):
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(OneLine("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.error("refused: %s", "x\nINFO all is well")
    try:
        raise FlapsamError("x\nINFO all is well")
    except FlapsamError:
        logger.exception("unexpected\x1b")
    handler.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:2] == ["ERROR refused: x\\nINFO all is well", "ERROR unexpected\\x1b"]
    assert lines[-1] == "    INFO all is well" and all(line.startswith("    ") for line in lines[2:])


CELLS = {
    "=cmd()": "'=cmd()",
    "=HYPERLINK('http://x','y')": "'=HYPERLINK('http://x','y')",
    "+1+cmd|' /C calc'!A0": "'+1+cmd|' /C calc'!A0",
    "-2+3": "'-2+3",
    "@SUM(A1)": "'@SUM(A1)",
    "\t=1": "'\t=1",
    "\r=1": "'\r=1",
    "-0.5": "-0.5",
    "+12": "+12",
    "-1.5e-3": "-1.5e-3",
    "case_1": "case_1",
    "": "",
}


@pytest.mark.parametrize(("cell", "expected"), CELLS.items(), ids=ascii)
def test_no_cell_is_a_formula(cell: str, expected: str):
    assert csv_cell(cell) == expected


def test_the_table_of_a_bench_has_no_formula():
    table = _csv([{"": "=row", "=class": "-0.012", "gain": "+0.012 (+0.001 to +0.023)"}])
    head, row = csv.reader(io.StringIO(table))
    assert head == ["", "'=class", "gain"] and row == ["'=row", "-0.012", "+0.012 (+0.001 to +0.023)"]


WORDS = {
    "left_kidney": "left_kidney",
    "kidney tumour (1.5)": "kidney tumour (1.5)",
    "a|b": "a\\|b",
    "<script>": "\\<script\\>",
    "[x](javascript:y)": "\\[x\\](javascript:y)",
    "_a_ *b* `c`": "\\_a\\_ \\*b\\* \\`c\\`",
    "a\n# b": "a\\\\n\\# b",
}


@pytest.mark.parametrize(("text", "expected"), WORDS.items(), ids=ascii)
def test_markdown_shows_text_as_it_is(text: str, expected: str):
    assert markdown(text) == expected


def test_names_in_a_model_card_are_only_text():
    card = trained("flap")[1]
    name = "<img src=x onerror=alert(1)>|![x](y)"
    card = card.model_copy(update={"classes": ["kidney", name], "licence": "MIT\ntags: [evil]"})
    text = model_card(card, Cohort("federated"), [SiteJoined(site="a|b", cases={"train": 1, "val": 0, "test": 0})])
    page = MarkdownIt().enable("table").render(text)
    assert "&lt;img src=x onerror=alert(1)&gt;|![x](y)" in page
    assert "<img" not in page and 'href="y"' not in page
    assert text.splitlines()[1].startswith("license: ") and "\ntags: [evil]" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| a")]
    assert row == "| a\\|b | 1 | 0 | 0 | – | – | – |"
