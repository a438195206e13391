"""Text from other people, made safe for the place where it is shown: a line of text, a cell of CSV, or Markdown."""

import re

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of cells that a spreadsheet computes."""


def one_line(text: str) -> str:
    """The text on one line, with an escape sequence in place of every character that cannot be printed."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def csv_cell(text: str) -> str:
    """The text as a cell that no spreadsheet computes. An apostrophe marks it as text; numbers stay as they are."""
    if text.startswith(FORMULA) and not _is_number(text):
        return f"'{text}"
    return text


def markdown(text: str) -> str:
    """The text for Markdown and for tables in it, shown as it is."""
    # Within a word, an underscore means nothing, so that names such as left_kidney stay readable.
    return re.sub(r"[\\`*\[\]<>|&~$#!@]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE) is not None
