"""``flapsam backbone``: Segment Anything Models to build on."""

from pathlib import Path
from typing import Annotated

import typer

from flapsam.cli.console import Json, Quiet, observing, out, print_json, say

app = typer.Typer(help="Find, download and inspect Segment Anything Models to build on.", no_args_is_help=True)


@app.command("list")
def list_backbones(as_json: Json = False) -> None:
    """List the backbones that flapsam knows by name, and where their checkpoints are."""
    from flapsam.report import tables
    from flapsam.sam.backbones import list_backbones as rows_of

    rows = rows_of()
    if as_json:
        return print_json(rows)
    out.print(tables.plain_table(rows))


@app.command()
def get(name: Annotated[str, typer.Argument(help="A name from `flapsam backbone list`.")], quiet: Quiet = False) -> None:
    """Download the checkpoint of a backbone, resuming an interrupted download."""
    from flapsam.sam.backbones import fetch

    with observing() as observer:
        path = fetch(name, observer)
    say(f"{name} is in {path}")


@app.command()
def info(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: .pth, .safetensors, or a transformers folder.")],
    check: Annotated[
        tuple[Path, str] | None,
        typer.Option(
            metavar="IMAGE BOX",
            help="Segment what lies in a box of a PNG or JPEG, given as left,top,right,bottom in pixels, to see whether the "
            "checkpoint works as its makers say.",
        ),
    ] = None,
    pixels: Annotated[
        str | None,
        typer.Option(help="Input normalisation for --check, paper or sam. By default, that of the file's source."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where --check writes its mask.")] = Path("mask.png"),
    as_json: Json = False,
) -> None:
    """Describe a checkpoint: architecture, image size, parameters, checksum."""
    from flapsam.report import tables
    from flapsam.sam.backbones import check_with_box, describe
    from flapsam.sam.checkpoints import read_checkpoint

    state = read_checkpoint(checkpoint)
    description = describe(checkpoint, state)
    if check is not None:
        check_with_box(checkpoint, state, *check, output, pixels)
        description["mask"] = str(output)
    if as_json:
        return print_json(description)
    out.print(tables.plain_table([{"": name, checkpoint.name: str(value)} for name, value in description.items()]))
