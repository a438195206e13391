"""Names of cases, sites, classes, variants and participants. Many come from other people, and many become file names."""

import unicodedata
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line

CHARACTERS, BYTES = 100, 200
"""Longest name, in characters and in bytes as UTF-8. File names have at most 255 bytes, with prefix and suffix."""


class NameRefused(FlapsamError, ValueError):  # noqa: N818 (it is a verdict)
    """A text is not used as a name. It is a ``ValueError``, too, because pydantic collects those."""


def as_name(text: str, where: str = "") -> str:
    """The text in the one spelling that names have (NFC).

    Args:
        text: the text, from anywhere.
        where: the file, row or field that holds it, for the error message.

    Raises:
        NameRefused: the text cannot be one component of a path.
    """
    name = spelling(text)
    if not name:
        fault = "it is empty"
    elif "/" in name or "\\" in name:
        fault = "it contains a slash or a backslash"
    elif name.startswith("."):
        fault = "it begins with a dot"
    elif not name.isprintable():
        fault = "it contains a character that cannot be printed"
    elif name != name.strip():
        fault = "it begins or ends with a space"
    elif len(name) > CHARACTERS or len(name.encode()) > BYTES:
        fault = f"it has more than {CHARACTERS} characters or {BYTES} bytes"
    else:
        return name
    raise NameRefused(f"{_at(where)}'{one_line(text[:CHARACTERS])}' cannot be a name, because {fault}; choose another name")


def check_distinct(names: Iterable[str], where: str = "") -> None:
    """Check that no two names are the same name. Some file systems ignore case and the encoding of accents.

    Args:
        names: the names.
        where: the file or field that holds them, for the error message.

    Raises:
        NameRefused: two names are equal, or differ only in case or in the encoding of accents.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = folded(name)
        if key in seen:
            raise NameRefused(f"{_at(where)}{clash(seen[key], name)}")
        seen[key] = name


def clash(first: str, second: str) -> str:
    """A sentence about two names that are one."""
    if first == second:
        return f"'{one_line(first)}' is listed twice; remove one"
    return (
        f"'{one_line(first)}' and '{one_line(second)}' count as the same name, because they differ only in case or in the "
        "encoding of accents; rename one"
    )


def spelling(text: str) -> str:
    """The text with accents in their composed form (NFC), in which all names are compared."""
    return unicodedata.normalize("NFC", text)


def folded(name: str) -> str:
    """What two names have in common that count as the same name."""
    return spelling(spelling(name).casefold())


def _at(where: str) -> str:
    return f"{one_line(where)}: " if where else ""


def _distinct(tree: Any) -> Any:
    # Keys of other types are left to pydantic.
    if isinstance(tree, dict | list):
        check_distinct(name for name in tree if isinstance(name, str))
    return tree


Value = TypeVar("Value")
Name = Annotated[str, AfterValidator(as_name)]
"""A name as a field of a pydantic model."""
Names = Annotated[list[Name], BeforeValidator(_distinct)]
"""Distinct names as a field of a pydantic model."""
Named = Annotated[dict[Name, Value], BeforeValidator(_distinct)]
"""Values by distinct names as a field of a pydantic model."""
