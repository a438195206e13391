"""``flapsam data``: list, describe, download and check data sets, or make synthetic ones."""

from pathlib import Path
from typing import Annotated

import typer

from flapsam.cli.console import Json, Quiet, observing, out, print_json, say

app = typer.Typer(help="List, check and download data sets, or make synthetic ones.", no_args_is_help=True)

DatasetName = Annotated[str, typer.Argument(help="A name from `flapsam data list`.")]


@app.command("list")
def list_data(as_json: Json = False) -> None:
    """List the data sets and folder layouts that flapsam reads."""
    from flapsam.report import tables
    from flapsam.sites import DATASETS

    rows = [{"name": d.name, "what": d.title, "modality": d.modality, "files": d.layout} for d in DATASETS.values()]
    if as_json:
        return print_json(rows)
    out.print(tables.plain_table(rows))


@app.command()
def info(name: DatasetName, as_json: Json = False) -> None:
    """Describe a data set: licence, source, size, sites and classes."""
    from flapsam.report import tables
    from flapsam.sites.fetching import about

    rows = about(name)
    if as_json:
        return print_json(rows)
    out.print(tables.plain_table([{"": key, name: value} for key, value in rows.items()]))


@app.command()
def get(
    name: DatasetName,
    folder: Annotated[Path, typer.Argument(help="Folder to unpack into.")],
    quiet: Quiet = False,
) -> None:
    """Download a public data set, or explain how to get it."""
    from flapsam.sites.fetching import fetch_data

    with observing() as observer:
        path = fetch_data(name, folder, observer)
    say(f"{name} is in {path}")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Folder of the data, in any layout that `flapsam data list` shows.")],
    config: Annotated[
        Path | None, typer.Option(metavar="RUN.yaml", help="Configuration that says which label values are classes.")
    ] = None,
    labels: Annotated[list[int] | None, typer.Option("--label", help="Label value that may occur. Repeatable.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read every case and list all problems, before any training."""
    from flapsam.run.reading import read_config
    from flapsam.sites.check import check_data
    from flapsam.volumes import sentences

    with observing() as observer:
        sites, checked = check_data(path, read_config(config) if config else None, labels or [], observer)
    count, values = sum(sites.values()), sorted(set().union(*checked.values.values()))
    left_out = sentences(checked.left_out)
    if as_json:
        by_site = {site: sorted(found) for site, found in checked.values.items()}
        print_json(
            {
                "sites": sites,
                "label_values": values,
                "label_values_by_site": by_site,
                "problems": checked.problems,
                "notes": checked.notes,
                "left_out": left_out,
            }
        )
    else:
        for problem in checked.problems:
            say(problem)
        for note in checked.notes:
            say(f"note: {note}")
        for sentence in left_out:
            say(sentence)
        say(f"label values: {', '.join(map(str, values)) or 'none'}")
        say(f"{count} cases at {len(sites)} sites, {len(checked.problems)} problems")
    if checked.problems:
        raise typer.Exit(2)


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Folder for the sites.")],
    sites: Annotated[int, typer.Option(min=1, help="Number of sites.")] = 4,
    cases: Annotated[int, typer.Option(min=2, help="Cases at each site. Three in ten are test cases.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed for every random choice.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Make synthetic sites: CT-like abdomens with kidneys and tumours."""
    from flapsam.experiments.phantom import make_phantom

    with observing() as observer:
        observer.begin("phantoms", sites * cases)
        make_phantom(folder, sites=sites, cases=cases, seed=seed, on_case=observer.step)
        observer.end()
    say(f"{sites * cases} cases at {sites} sites written to {folder}")
