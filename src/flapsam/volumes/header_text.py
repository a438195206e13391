"""Checks of the text in the headers of NRRD and MetaImage files, before code in C parses it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import check_file
from flapsam.volumes.content import misnamed
from flapsam.volumes.stored import Stored

HEADER_BYTES = 2**20
"""Largest size of a header in bytes."""
FIELD = 1000
"""Largest length of a line with a field that readers parse."""
LARGEST = 2**31 - 1
"""Largest size of an axis, and largest whole number in a header."""

Check = Callable[[str], bool]


@dataclass(frozen=True)
class Header:
    """A header that was checked."""

    fields: dict[str, str]
    """Name → value, as in the file."""
    stored: Stored | None
    """Where the voxels are stored, or None if only ITK can read them, because they are text."""
    units: tuple[str, ...]
    """Names of the units of length, for all axes together or one by one."""


def broken(path: Path, reason: str) -> FlapsamError:
    """The error for a header that is not passed on."""
    return FlapsamError(f"{path}: its header is damaged, because {reason}; export it again")


def read_lines(path: Path, form: str, is_last: Callable[[str], bool]) -> tuple[list[str], int]:
    """Read the lines of a header.

    Args:
        path: the file.
        form: name of its format.
        is_last: whether a line ends the header. The end of the file also does.

    Returns:
        The lines, with the last, and the number of bytes that they take.

    Raises:
        FlapsamError: there is no file, or its header is too long or is not text.
    """
    check_file(path)
    lines: list[str] = []
    try:
        with path.open("rb") as file:
            while file.tell() <= HEADER_BYTES:
                raw = file.readline(HEADER_BYTES + 1)
                line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("latin-1")
                if any((ord(letter) < 32 and letter != "\t") or ord(letter) == 127 for letter in line):
                    if not lines:
                        raise FlapsamError(misnamed(path, form))
                    raise broken(path, f"line {len(lines) + 1} is not text")
                lines.append(line)
                if not raw or is_last(line):
                    return lines, file.tell()
    except OSError as error:
        raise FlapsamError(f"{path}: cannot be read ({error.strerror})") from error
    raise broken(path, f"it is longer than {HEADER_BYTES} bytes")


def data_file(header: Path, name: str) -> Path:
    """The file that a header names for its voxels, which must be a file in the header's own folder.

    Raises:
        FlapsamError: the name has a path in it, or leads to something else.
    """
    path = header.parent / name
    if not name or name.startswith(".") or any(letter in name for letter in "/\\%") or len(name) > 255:
        raise broken(header, f"its voxels must be in a file beside it, not in '{name[:100]}'")
    if not path.is_file():
        raise broken(header, f"the file with its voxels, {name}, is missing")
    if path.resolve().parent != header.parent.resolve() or path.resolve() == header.resolve():
        raise broken(header, f"its voxels must be in a file beside it, but {name} leads elsewhere")
    return path


def whole(text: str, low: int = 1, high: int = LARGEST) -> int | None:
    """The whole number that a text is, or None if it is not one from ``low`` to ``high``."""
    text = text.strip()
    if len(text) > 20 or not text.isascii() or not text.removeprefix("-").isdigit():
        return None
    number = int(text)
    return number if low <= number <= high else None


def sizes(text: str, count: int) -> list[int] | None:
    """The sizes of ``count`` axes, or None if the text is anything else."""
    numbers = [whole(word) for word in text.split()]
    return [number for number in numbers if number] if len(numbers) == count and all(numbers) else None


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return len(text) < 60 and "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False


def are_numbers(*counts: int) -> Check:
    """A check for as many finite numbers as one of the counts, or for any number of them."""

    def check(text: str) -> bool:
        words = text.split()
        return (not counts or len(words) in counts) and all(is_number(word) for word in words)

    return check


def one_of(*words: str) -> Check:
    """A check for one of the words, in any case of letters."""
    return lambda text: text.strip().lower() in words


def is_any(text: str) -> bool:
    """A check that every text passes."""
    return True
