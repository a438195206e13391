"""Commands that prepare, start and follow runs: ``demo``, ``init``, ``simulate``, ``status``."""

from pathlib import Path
from typing import Annotated

import typer

from flapsam.base.errors import FlapsamError
from flapsam.cli.console import (
    Assignments,
    FromRound,
    Json,
    Quiet,
    Track,
    interrupted,
    interruptible,
    observing,
    out,
    print_json,
    say,
    warn,
)

app = typer.Typer()


@app.command()
def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="New folder for everything that the demo writes.")] = Path("demo"),
    sites: Annotated[int, typer.Option(min=2, help="Number of synthetic sites.")] = 4,
    cases: Annotated[int, typer.Option(min=4, help="Cases at each site.")] = 10,
    assignments: Assignments = None,
) -> None:
    """Try flapsam without data: make synthetic sites, train, segment and score. Takes about 5 minutes on two cores."""
    import shlex

    from flapsam.experiments.demo import begin_demo, demo_commands

    changes = assignments or []
    begin_demo(folder, changes)
    flapsam = context.find_root().command
    for command in demo_commands(folder, sites=sites, cases=cases, assignments=changes):
        out.print("\n[bold]$ [/]", end="")
        say(shlex.join(["flapsam", *command]))
        if code := flapsam.main(command, standalone_mode=False):
            raise typer.Exit(code)
    out.print()
    say(f"To look at the cases in three planes and in 3-D: flapsam view {folder / 'run'}")


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Folder of the data, in any layout that `flapsam data list` shows.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN.yaml", help="Configuration file to write.")] = Path(
        "run.yaml"
    ),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Inspect a data set and write a configuration for it, with a reason for each choice."""
    from dataclasses import asdict

    from flapsam.experiments.init import initialise, minutes
    from flapsam.sites import unused
    from flapsam.volumes import sentences

    with observing() as observer:
        seen, estimate = initialise(data, output, observer)
    for sentence in sentences(unused(data, [case for site in seen.sites for case in site.cases])):
        warn(sentence)
    if as_json:
        return print_json({"run": str(output), **asdict(estimate), "notes": seen.notes})
    out.print(output.read_text(), highlight=False, markup=False, soft_wrap=True, end="")
    out.print()
    for note in seen.notes:
        warn(f"note: {note}")
    say(
        f"Wrote {output} for {seen.cases} cases; training will take about {minutes(estimate.seconds)} here. "
        f"Next: flapsam simulate {output}"
    )


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Configuration of the run.")],
    assignments: Assignments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    from_round: FromRound = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of sites that train in parallel.")] = 1,
    track: Track = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune SAM across simulated sites on this machine: from volumes to adapter, label maps and scores."""
    from flapsam.experiments.simulation import simulate as run
    from flapsam.report import tables
    from flapsam.report.page import write_report
    from flapsam.report.tracking import tracked
    from flapsam.run.reading import read_config

    configuration = read_config(config, assignments or [])
    advice = f"Finished work is in {configuration.output}; add --resume to continue."
    with interruptible(advice) as shown, tracked(shown, track or [], warn) as observer:
        results = run(configuration, resume=resume, from_round=from_round, workers=workers, observer=observer)
    if as_json:
        print_json(results.as_json())
    else:
        for table in tables.results_tables(results):
            out.print(table)
    # The report comes last, so that the results are printed even if it cannot be written.
    with observing() as observer:
        page = write_report(results.folder, observer=observer)
    if not as_json:
        say(f"Adapters, label maps and the ledger are in {results.folder}, the report is {page}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, which may be running elsewhere.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep showing the status until the run ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show the status of a run, read from its ledger: rounds, sites, Dice, traffic, problems, time left."""
    from flapsam.report.status import as_json_of, read_status, show, watch

    if follow and as_json:
        raise FlapsamError("--follow: leave out --json, which prints the status once")
    with interrupted("The run itself continues."):
        if as_json:
            return print_json(as_json_of(read_status(run)))
        (watch if follow else show)(run, out)
