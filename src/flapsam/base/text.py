"""Text that people write with any editor or spreadsheet, in the encoding that the program happened to choose."""

import json
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import read_bytes

ARCHIVES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x1f\x8b")
"""Beginnings of zip archives, which new workbooks are, of old workbooks, and of gzip files."""


def read_document(path: Path) -> str:
    """Read text in UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        FlapsamError: there is something at ``path`` that is not a file, or the file is far too large, or it is not text. The
            message names the line.
        OSError: the file is missing or cannot be read.
    """
    data = read_bytes(path)
    if data.startswith(ARCHIVES):
        raise FlapsamError(f"{path}: this is a workbook or an archive, not text; save it as text in UTF-8")
    # By the byte order mark, or else by the zeros that UTF-16 puts beside the first letters.
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise FlapsamError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not text in {encoding.upper()}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise FlapsamError(
            f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: a zero byte is not text; save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
