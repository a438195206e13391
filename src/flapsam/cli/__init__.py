"""The command line. A command reads its arguments, calls one function and prints the result.

Heavy imports are made inside the commands, so that ``--help`` responds at once.
"""

import sys
from typing import Annotated

import typer

from flapsam.base.errors import FlapsamError
from flapsam.base.files import disk_problem
from flapsam.base.version import __version__
from flapsam.cli import backbone, compare, data, federation, machine, results, runs, segment
from flapsam.cli.console import out, show_error

app = typer.Typer(
    help="Federated, parameter-efficient fine-tuning of the Segment Anything Model for medical volumes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for commands in (runs, results, compare, segment, machine):
    app.add_typer(commands.app)
app.add_typer(data.app, name="data")
app.add_typer(backbone.app, name="backbone")
app.add_typer(federation.app, name="federation")


def main() -> None:
    """Run the command line. A user's error, or a full or read-only disk, is reported in one sentence, with exit code 2."""
    try:
        app()
    except FlapsamError as error:
        show_error(str(error))
        sys.exit(2)
    except OSError as error:
        sentence = disk_problem(error)
        if sentence is None:
            raise
        show_error(sentence)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit
