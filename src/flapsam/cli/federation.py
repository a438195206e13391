"""``flapsam federation``: runs between hospitals."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from flapsam.base.errors import FlapsamError
from flapsam.cli.console import (
    Assignments,
    Checkpoint,
    FromRound,
    Json,
    Quiet,
    Track,
    interruptible,
    out,
    print_json,
    say,
    warn,
)

app = typer.Typer(
    help="""Train between hospitals, over mutual TLS.

    Without secure aggregation, the server sees every site's updates, and a malicious site can spoil the model: see
    docs/federation.md.""",
    no_args_is_help=True,
)

KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="Folder of the start-up kit.")]
CoordinatorKit = Annotated[Path, typer.Option("--kit", metavar="KIT", help="Start-up kit of the coordinator.")]
SiteConfigOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="SITE.yaml", help="Configuration of the site. By default site.yaml in the kit."),
]
Unit = Annotated[bool, typer.Option("--unit", help="Print a systemd unit instead.")]
COORDINATOR = Path("kits/coordinator")


@app.callback()
def _needs_nvflare() -> None:
    if importlib.util.find_spec("nvflare") is None:
        raise FlapsamError("flapsam federation needs NVFLARE; install it with: pip install 'flapsam[nvflare]'")


@app.command()
def provision(
    federation: Annotated[
        Path, typer.Argument(metavar="FEDERATION.yaml", help="File with the server's address and the sites' names.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the kits.")] = Path("kits"),
    renew: Annotated[list[str] | None, typer.Option(help="Participant whose kit to replace, or `all`. Repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Make a start-up kit for the server, the coordinator and each site. Existing kits are kept."""
    from flapsam.federation.engines.nvflare.kits import provision as make
    from flapsam.report import tables

    rows = [
        {"kit": str(kit.folder), "for": kit.card.role, "certificate until": str(kit.certificate.not_valid_after_utc.date())}
        for kit in make(federation, output, renew or [])
    ]
    if as_json:
        return print_json(rows)
    out.print(tables.plain_table(rows))
    say(
        "Send each participant its kit over a channel that you trust. Anyone who has a kit can act as its participant. "
        f"Keep {output / 'authority'} secret."
    )


@app.command()
def server(kit: KitArgument, unit: Unit = False) -> None:
    """Run the server until Ctrl-C."""
    _launch(kit, "server", None, unit)


@app.command()
def site(kit: KitArgument, data: SiteConfigOption = None, unit: Unit = False) -> None:
    """Run a site until Ctrl-C."""
    _launch(kit, "site", data, unit)


@app.command()
def key(kit: KitArgument, data: SiteConfigOption = None, as_json: Json = False) -> None:
    """Show the public key with which a site signs in secure aggregation. It is made if there is none yet."""
    from flapsam.federation.engines.nvflare.kits import read_kit
    from flapsam.federation.hospitals.site_config import read_site_config
    from flapsam.federation.preparation import check_secure_installed

    check_secure_installed()
    from flapsam.federation.secure_aggregation.identity import Identity

    name = read_kit(kit, "site").card.name
    public = Identity(read_site_config(data or kit / "site.yaml").identity).public
    if as_json:
        return print_json({name: public})
    out.print(f"{name}: {public}", soft_wrap=True)
    say("The other sites enter this line in site.yaml, under secure.partners. Give it to them by a way that you trust.")


@app.command()
def journal(
    kit: KitArgument,
    data: SiteConfigOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksum of every entry.")] = False,
    noted: Annotated[
        str | None, typer.Option("--noted", metavar="CHECKSUM", help="Newest checksum of an earlier time; implies --verify.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what runs asked of a site and what left it, or check that nobody has changed this journal."""
    from dataclasses import asdict

    from flapsam.base.files import read_text
    from flapsam.federation.hospitals.journal import verify as check_chain
    from flapsam.federation.hospitals.site_config import read_site_config

    path = read_site_config(data or kit / "site.yaml").journal
    if not path.exists():
        raise FlapsamError(f"{path}: there is no journal yet; a site writes it once it has been asked to take part in a run")
    found = check_chain(path, noted) if verify or noted else None
    if as_json:
        return print_json(asdict(found) if found else [json.loads(line) for line in read_text(path).splitlines()])
    if found is None:
        for line in read_text(path).splitlines():
            say(line)
        return None
    earlier = f", of which the first {found.unchained} are from a version without checksums" if found.unchained else ""
    say(f"{found.entries} entries{earlier}: " + ", ".join(f"{count} × {kind}" for kind, count in found.kinds.items()))
    say(f"Every checksum is right. The newest is {found.head}")
    say("Note it elsewhere. With --noted, this command later finds out whether entries were removed or written again since.")


@app.command()
def check(
    kit: KitArgument,
    data: SiteConfigOption = None,
    config: Annotated[Path | None, typer.Option(metavar="RUN.yaml", help="Configuration of a run to rehearse.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a site's certificate, network, data, disk and memory before it takes part in a run."""
    from dataclasses import asdict

    from flapsam.federation.engines.nvflare.preflight import check_site
    from flapsam.report import tables

    with interruptible("Nothing was changed.") as observer:
        findings = list(check_site(kit, data, config, observer))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [{"": "ok" if f.fine else "problem", "what": f.what, "about": f.about} for f in findings]
        out.print(tables.plain_table(rows))
    if not all(finding.fine for finding in findings):
        raise typer.Exit(2)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Configuration of the run, as for `flapsam simulate`.")],
    kit: CoordinatorKit = COORDINATOR,
    assignments: Assignments = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for missing sites that rounds.require leaves out.")
    ] = 60,
    from_round: FromRound = None,
    track: Track = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Start or resume a run and follow it to its end. Use it on the server's machine."""
    from flapsam.federation.engines.nvflare.jobs import run as follow
    from flapsam.federation.hospitals.run_config import read_federated_config
    from flapsam.report.page import write_report
    from flapsam.report.tracking import tracked

    configuration = read_federated_config(config, assignments or [])
    advice = (
        "Rounds that have begun continue at the server. Run the same command to follow them, or flapsam federation stop."
    )
    with interruptible(advice) as shown, tracked(shown, track or [], warn) as observer:
        adapter = follow(configuration, kit, observer, wait=wait, from_round=from_round)
    if as_json:
        print_json({"adapter": str(adapter)})
    else:
        say(f"The adapter is in {adapter}")
    page = write_report(adapter.parent)
    if not as_json:
        say(f"The report is {page}")


@app.command()
def evaluate(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of runs or adapters. The first is the reference.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the scores and their report.")],
    kit: CoordinatorKit = COORDINATOR,
    sites: Annotated[list[str] | None, typer.Option("--site", metavar="SITE", help="Site to ask. Repeatable.")] = None,
    checkpoint: Checkpoint = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for missing sites before starting without them.")] = 60,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Have the sites score adapters on their own test cases. Only summary figures leave a site.

    Use it on the server's machine.
    """
    from flapsam.federation.engines.nvflare.jobs import evaluate as follow
    from flapsam.federation.hospitals.evaluation import evaluation_of, names_of
    from flapsam.report import tables
    from flapsam.report.page import write_report
    from flapsam.report.run import read_run

    config = evaluation_of(adapters, output, sites, checkpoint)
    advice = (
        "The evaluation continues at the server. Run the same command to follow it, or flapsam federation stop to stop it."
    )
    with interruptible(advice) as observer:
        folder = follow(adapters, config, kit, observer, wait=wait)
    events, page = read_run(folder).events, write_report(folder)
    if as_json:
        return print_json(tables.site_tests_json(events, names_of(config)))
    for table in tables.site_tests_tables(events, names_of(config)):
        out.print(table)
    say(f"The report is {page}")


@app.command()
def status(kit: CoordinatorKit = COORDINATOR, as_json: Json = False) -> None:
    """Show whether the server is up and which sites are connected."""
    from flapsam.federation.engines.nvflare.jobs import status as ask
    from flapsam.report import tables

    answer = ask(kit)
    if as_json:
        return print_json(answer)
    say(f"{answer['server']}: up since {answer['since']}, jobs running: {len(answer['jobs'])}")
    rows = [{"site": name, "": "connected" if seen else "not connected"} for name, seen in answer["sites"].items()]
    out.print(tables.plain_table(rows))


@app.command()
def stop(kit: CoordinatorKit = COORDINATOR, as_json: Json = False) -> None:
    """Stop the current run. Finished rounds are kept, and `flapsam federation run` resumes the run."""
    from flapsam.federation.engines.nvflare.jobs import stop as end

    jobs = end(kit)
    if as_json:
        return print_json({"ended": jobs})
    say(f"Jobs stopped: {len(jobs)}" if jobs else "No job is running.")


def _launch(folder: Path, role: Literal["server", "site"], site_config: Path | None, unit: bool) -> None:
    from flapsam.federation.engines.nvflare.launch import launch, unit_of

    if unit:
        return out.print(unit_of(folder, role, site_config), highlight=False, markup=False, soft_wrap=True, end="")
    launch(folder, role, warn, site_config=site_config)
