"""What all commands share: where they print, options, and how long work is shown and interrupted."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from flapsam.report.progress import ConsoleObserver

out, notes = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as rounds.count=5.")
]


def observing() -> "ConsoleObserver":
    """Shows long work."""
    from flapsam.report.progress import ConsoleObserver

    return ConsoleObserver(notes)


@contextmanager
def interruptible(advice: str) -> "Iterator[ConsoleObserver]":
    """Shows long work; interrupted, it ends with the advice and exit code 130."""
    try:
        with observing() as observer:
            yield observer
    except KeyboardInterrupt:
        notes.print(f"Interrupted. {advice}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def print_json(value: Any) -> None:
    """A result for other programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def escaped(text: str) -> str:
    """Text in which nothing is taken for markup."""
    from rich.markup import escape

    return escape(text)
