"""The one exception that a user is meant to read."""

from collections.abc import Mapping
from typing import TypeVar

from flapsam.base.version import __version__

T = TypeVar("T")


class FlapsamError(Exception):
    """Something is wrong with what the user gave: one clear sentence that says what, in which file, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


def too_new(written: object, known: int) -> str | None:
    """What to say of a file whose format has this number, if that is above the highest one known."""
    if isinstance(written, int) and written > known:
        return f"format {written} is newer than flapsam {__version__} knows; install a newer flapsam"
    return None


def choose(field: str, name: str, registry: Mapping[str, T]) -> T:
    """The member of a registry that the user named in ``field``.

    Raises:
        FlapsamError: there is none of that name.
    """
    if name not in registry:
        raise FlapsamError(f"{field} '{name}' is unknown; choose one of {', '.join(registry)}")
    return registry[name]
