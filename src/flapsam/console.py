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
work = Console(stderr=True)
"""Where long work is shown, unless ``--quiet`` is given."""


def _hush(quiet: bool) -> bool:
    work.quiet = quiet
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors and the result only.", callback=_hush)]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="TRACKER", help="Write the figures for tensorboard or mlflow, too; repeatable."),
]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as rounds.count=5.")
]


def observing() -> "ConsoleObserver":
    """Shows long work."""
    from flapsam.report.progress import ConsoleObserver

    return ConsoleObserver(work)


@contextmanager
def interruptible(advice: str) -> "Iterator[ConsoleObserver]":
    """Shows long work; interrupted, it ends with the advice and exit code 130."""
    with interrupted(advice), observing() as observer:
        yield observer


def warn(text: str) -> None:
    """Something that went wrong and ends nothing; ``--quiet`` does not hush it."""
    notes.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def interrupted(advice: str) -> Iterator[None]:
    """Ends with the advice and exit code 130 when it is interrupted."""
    try:
        yield
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
