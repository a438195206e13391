"""Names that differ only in what programs change: leading zeros, letter case, file suffixes and nnU-Net's number."""

import re
from collections.abc import Iterable

from flapsam.base.names import folded

CHANGED = (
    (r"\.nii(\.gz)?$", ""),
    (r"_0000$", ""),
    # A spreadsheet reads 001 as a number, and writes it as 1 or as 1.0.
    (r"^(\d+)\.0$", r"\1"),
    (r"(?<!\d)0+(?=\d)", ""),
    (r"[\s_-]+", "_"),
)
"""What is replaced, and by what, before two names are compared."""


def near(name: str, names: Iterable[str]) -> str | None:
    """The one of the names that was probably meant. None if none is near, or several are."""
    found = {other for other in names if other != name and _plain(other) == _plain(name)}
    return found.pop() if len(found) == 1 else None


def _plain(name: str) -> str:
    plain = folded(name)
    for pattern, replacement in CHANGED:
        plain = re.sub(pattern, replacement, plain)
    return plain
