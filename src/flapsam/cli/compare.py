"""Commands that compare runs: ``bench`` and ``suggest``."""

from pathlib import Path
from typing import Annotated

import typer

from flapsam.base.errors import FlapsamError
from flapsam.cli.console import Assignments, Json, Quiet, interruptible, out, print_json, say, warn

app = typer.Typer()

BenchConfig = Annotated[
    str,
    typer.Argument(
        metavar="RUN.yaml",
        help="Configuration whose field `bench` lists what to compare, or the name of settings that ship with flapsam.",
    ),
]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder of the data. Overrides data.path.")]


@app.command()
def bench(
    config: BenchConfig,
    data: DataFolder = None,
    assignments: Assignments = None,
    only: Annotated[str, typer.Option(help="Compute only the cells whose names match, such as 'flap*'.")] = "*",
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Compute only every N-th of these cells, from cell I on.")
    ] = "0/1",
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no new cell after this many minutes.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of sites that train in parallel.")] = 1,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare strategies, modes, aggregators and seeds in one table. Only cells without a result are computed.

    Several processes may share the folder. Each cell is computed once.
    """
    from dataclasses import asdict

    from flapsam.experiments.bench import bench as run
    from flapsam.experiments.settings import read_settings
    from flapsam.report.bench_figure import draw
    from flapsam.report.bench_table import bench_table, write_tables

    configuration = read_settings(config, data, assignments or [])
    advice = f"Finished cells are in {configuration.output}; run the same command to continue."
    with interruptible(advice) as observer:
        part = _part(shard)
        result = run(configuration, only=only, shard=part, minutes=minutes, workers=workers, observer=observer)
    write_tables(result)
    draw(result)
    if as_json:
        return print_json([asdict(row) for row in result.rows])
    out.print(bench_table(result))
    say(f"{result.folder} has all columns in bench.md, bench.csv and bench.json, and a chart in bench.svg")


def _part(shard: str) -> tuple[int, int]:
    """Read ``--shard``. Counts from 1 do as well as counts from 0, since schedulers have either."""
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 0 <= int(number) <= int(count) and int(count) > 0):
        raise FlapsamError(f"--shard {shard}: is not a part such as 0/4, 1/4, 2/4 or 3/4")
    return int(number) % int(count), int(count)


@app.command()
def suggest(
    config: BenchConfig,
    data: DataFolder = None,
    assignments: Assignments = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Acceptable loss in Dice.")] = 0.01,
    as_json: Json = False,
) -> None:
    """Name the cheapest choice of a bench (fewest parameters) whose Dice is close to the best."""
    from dataclasses import asdict

    from flapsam.experiments.bench import read_bench
    from flapsam.experiments.bench import suggest as choose
    from flapsam.experiments.settings import read_settings

    suggestion = choose(read_bench(read_settings(config, data, assignments or [])).rows, tolerance)
    if as_json:
        return print_json({"suggested": asdict(suggestion.cheapest), "best": asdict(suggestion.best)})
    for name, row in (("best", suggestion.best), (f"cheapest within {tolerance:g}", suggestion.cheapest)):
        say(f"{name}: {row.row.name}, Dice {row.mean_dice:.3f}, {row.parameters:,} parameters")
    if suggestion.missing:
        warn(f"Some cells have no result yet, so this may change: {'; '.join(suggestion.missing)}")
