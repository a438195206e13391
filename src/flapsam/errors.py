"""The one exception that a user is meant to read."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class FlapsamError(Exception):
    """Something is wrong with what the user gave: one clear sentence that says what, in which file, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


def choose(field: str, name: str, registry: Mapping[str, T]) -> T:
    """The member of a registry that the user named in ``field``.

    Raises:
        FlapsamError: there is none of that name.
    """
    if name not in registry:
        raise FlapsamError(f"{field} '{name}' is unknown; choose one of {', '.join(registry)}")
    return registry[name]
