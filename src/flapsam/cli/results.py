"""Commands that show a run's results: ``report``, ``view``, ``track``."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from flapsam.cli.console import (
    Checkpoint,
    Json,
    Quiet,
    TrackerName,
    TrainedOption,
    interruptible,
    observing,
    out,
    print_json,
    say,
)

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folder of a run, or of several runs to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PAGE.html",
            help="File to write. By default report/index.html in the run's folder, or comparison.html for several runs.",
        ),
    ] = None,
    images: Annotated[bool, typer.Option(help="Include image strips of the best, median and worst cases.")] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the report of a run, or a comparison of several, as one HTML page that needs no network."""
    from flapsam.report.comparison import write_reports

    with observing() as observer:
        page = write_reports(runs, output, images=images, observer=observer)
    if as_json:
        return print_json({"report": str(page)})
    say(f"Wrote the report to {page}")


@app.command()
def view(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_IMAGE", help="Folder of a run, or an image.")],
    case: Annotated[
        str | None, typer.Argument(help="Case of the run, as CASE or SITE/CASE. Without it, the report opens.")
    ] = None,
    prediction: Annotated[Path | None, typer.Option(help="Label map of the image.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Second label map, such as the ground truth.")] = None,
    uncertainty: Annotated[Path | None, typer.Option(help="Uncertainty of the image, from flapsam predict.")] = None,
    trained: TrainedOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. By default, any free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the address in a browser.")] = True,
) -> None:
    """View volumes and their label maps in a browser. Only this machine can connect, and Ctrl-C stops the server."""
    from flapsam.report.viewing import opened, view_server

    with interruptible("The viewer is closed.") as observer:
        server, address = view_server(path, case, prediction, truth, uncertainty, trained, port, observer)
        say(f"Open {address}")
        say("Only this machine can reach it. Press Ctrl-C to stop.")
        with opened(address) if browser else nullcontext():
            server.run()


@app.command()
def audit(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a simulated run, or of its adapter.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of the data, if it is not where the run found it.")
    ] = None,
    checkpoint: Checkpoint = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="AUDIT.json", help="File to write.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Attack an adapter: do its losses tell which patients it was trained on?"""
    from flapsam.base.files import write_text
    from flapsam.experiments.audit import audit as attack
    from flapsam.report import tables

    with interruptible("Nothing was written.") as observer:
        outcome = attack(path, data, checkpoint, observer)
    if output:
        write_text(output, json.dumps(outcome.as_json(), indent=2) + "\n")
    if as_json:
        return print_json(outcome.as_json())
    out.print(tables.audit_table(outcome))
    say(
        "Members are training patients, and the others are test patients. An AUC of 0.5 is a guess. One attack that fails "
        "is no proof of privacy."
    )
    if output:
        say(f"Every patient's loss is in {output}")


@app.command()
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    to: Annotated[list[TrackerName], typer.Option("--to", help="Software to write metrics for. Repeatable.")],
) -> None:
    """Write the metrics of a run for TensorBoard or MLflow. Metrics that were written before are skipped."""
    from flapsam.report.tracking import track_run

    for place in track_run(run, to):
        say(place)
