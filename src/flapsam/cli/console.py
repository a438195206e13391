"""Shared by all commands: output, common options, progress, and the handling of Ctrl-C."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flapsam.base.escaping import one_line

if TYPE_CHECKING:
    from flapsam.report.progress import ConsoleObserver

out, notes = Console(), Console(stderr=True)
work = Console(stderr=True)
"""Console for the progress of long work. ``--quiet`` silences it."""


class TrackerName(StrEnum):
    """Software that a run's metrics can be written for."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"


def _hush(quiet: bool) -> bool:
    work.quiet = quiet
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only errors and the result.", callback=_hush)]
Track = Annotated[
    list[TrackerName] | None, typer.Option("--track", help="Also write metrics for this software. Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as rounds.count=5. Repeatable."),
]
FromRound = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Repeat the run from round N on. Drops what it has done since."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of threads. All cores by default.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the network's square input in pixels.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the low-rank adapters.")]
TrainedArgument = Annotated[
    Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a finished run or of an adapter.")
]
TrainedOption = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="RUN_OR_ADAPTER", help="Run or adapter that says what the label values mean."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", "--weights", help="Checkpoint of the backbone, if it neither ships nor was downloaded."),
]


def say(text: str, *, to: Console = out) -> None:
    """Print a sentence as it is, on one line, without interpreting markup or control characters or adding colours."""
    to.print(one_line(text), highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning, which ``--quiet`` does not hide."""
    say(text, to=notes)


def show_error(text: str) -> None:
    """Print the error that ended the command."""
    notes.print("[bold red]Error:[/]", end=" ")
    say(text, to=notes)


def print_json(value: Any) -> None:
    """Print a result as JSON, for other programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def observing() -> "ConsoleObserver":
    """An observer that shows the progress of long work."""
    from flapsam.report.progress import ConsoleObserver

    return ConsoleObserver(work)


@contextmanager
def interrupted(advice: str) -> Iterator[None]:
    """On Ctrl-C, print the advice and end with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        warn(f"Interrupted. {advice}")
        raise typer.Exit(130) from None


@contextmanager
def interruptible(advice: str) -> "Iterator[ConsoleObserver]":
    """Show the progress of long work. On Ctrl-C, print the advice and end with exit code 130."""
    with interrupted(advice), observing() as observer:
        yield observer
