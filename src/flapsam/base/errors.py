"""The one exception that is written for users."""

from collections.abc import Mapping
from typing import TypeVar

from flapsam.base.version import __version__

T = TypeVar("T")


class FlapsamError(Exception):
    """Something is wrong with the user's input. The message is one sentence: what is wrong, in which file, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def too_new(written: object, known: int) -> str | None:
    """The message for a file of a format that this version does not know yet, or None if it does.

    Args:
        written: format number in the file.
        known: highest format number that this version reads.
    """
    if isinstance(written, int) and written > known:
        return f"format {written} is newer than flapsam {__version__} knows; install a newer flapsam"
    return None


def choose(field: str, name: str, registry: Mapping[str, T]) -> T:
    """The member of a registry that the user named in ``field``.

    Raises:
        FlapsamError: the name is unknown.
    """
    if name not in registry:
        raise FlapsamError(f"{field} '{name}' is unknown; choose one of {', '.join(registry)}")
    return registry[name]
