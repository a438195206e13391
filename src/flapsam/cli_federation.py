"""``flapsam federation``: a run between hospitals."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from flapsam.console import Assignments, Json, Quiet, Track, interruptible, notes, out, print_json, warn
from flapsam.errors import FlapsamError

federation_app = typer.Typer(
    help="""Run between hospitals, over mutual TLS.

    WARNING: all parties must trust each other fully. Today a participant can read other participants' files.""",
    no_args_is_help=True,
)

KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="The start-up kit's folder.")]
CoordinatorKit = Annotated[Path, typer.Option("--kit", metavar="KIT", help="The coordinator's start-up kit.")]
SiteFileOption = Annotated[
    Path | None, typer.Option("--data", metavar="SITE.yaml", help="The site's own file; site.yaml in the kit by default.")
]
Unit = Annotated[bool, typer.Option("--unit", help="Print a systemd unit instead.")]
COORDINATOR = Path("kits/coordinator")
FIXED = ["data.path=/", "modes=[federated]", "data.table=null", "data.simulated_sites=null"]
"""Where the data are is each site's own to say, and a federation trains one model together."""


@federation_app.callback()
def _needs_nvflare() -> None:
    if importlib.util.find_spec("nvflare") is None:
        raise FlapsamError("flapsam federation needs NVFLARE; install it with: pip install 'flapsam[nvflare]'")


@federation_app.command()
def provision(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION.yaml", help="The server's place and the sites' names.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the kits.")] = Path("kits"),
    renew: Annotated[list[str] | None, typer.Option(help="Make a participant's kit anew, or those of all.")] = None,
    as_json: Json = False,
) -> None:
    """Make a start-up kit for the server, the coordinator and each site; those that are there stay as they are."""
    from flapsam.federation.engines.nvflare.kits import provision as make

    kits = make(federation, output, renew or [])
    rows = [
        {"kit": str(kit.folder), "for": kit.card.role, "certificate until": str(kit.certificate.not_valid_after_utc.date())}
        for kit in kits
    ]
    if as_json:
        return print_json(rows)
    from flapsam.report import tables

    out.print(tables.plain_table(rows))
    out.print(
        f"Give each its own kit by a safe way: whoever has it is that participant. Keep {output / 'authority'} to yourself.",
        highlight=False,
        soft_wrap=True,
    )


@federation_app.command()
def server(kit: KitArgument, unit: Unit = False) -> None:
    """Run the server, until Ctrl-C."""
    _serve(kit, "server", None, unit)


@federation_app.command()
def site(kit: KitArgument, data: SiteFileOption = None, unit: Unit = False) -> None:
    """Run a site, until Ctrl-C."""
    _serve(kit, "site", data, unit)


@federation_app.command()
def check(
    kit: KitArgument,
    data: SiteFileOption = None,
    config: Annotated[Path | None, typer.Option(metavar="RUN.yaml", help="A run whose beginning is tried out.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tell a site in advance whether certificate, network, data and memory will do."""
    from dataclasses import asdict

    from flapsam.config import read_config
    from flapsam.federation.engines.nvflare.kits import read_kit
    from flapsam.federation.site_file import read_site_file
    from flapsam.report import tables
    from flapsam.site_check import check_site

    found = read_kit(kit, "site")
    proposed = read_config(config, FIXED) if config else None
    with interruptible("Nothing was changed.") as observer:
        findings = list(check_site(found, read_site_file(data or kit / "site.yaml"), proposed, observer))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [{"": "ok" if one.fine else "problem", "what": one.what, "about": one.about} for one in findings]
        out.print(tables.plain_table(rows))
    if not all(finding.fine for finding in findings):
        raise typer.Exit(2)


@federation_app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run, as for flapsam simulate.")],
    kit: CoordinatorKit = COORDINATOR,
    assignments: Assignments = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds for sites that are not there, once there are enough.")] = 60,
    track: Track = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Conduct a run to its end, on the server's machine; what was begun is gone on with."""
    from flapsam.config import read_config
    from flapsam.federation.engines.nvflare.coordination import run as conduct
    from flapsam.federation.engines.nvflare.kits import read_kit
    from flapsam.report.page import write_report
    from flapsam.tracking import tracked

    configuration = read_config(config, [*(assignments or []), *FIXED])
    advice = "The server goes on with the round; the same command follows it, and flapsam federation stop ends it."
    with interruptible(advice) as shown, tracked(shown, track, warn) as observer:
        adapter = conduct(configuration, read_kit(kit, "coordinator"), observer, wait=wait)
    if as_json:
        print_json({"adapter": str(adapter)})
    else:
        out.print(f"The adapter is in {adapter}", highlight=False, soft_wrap=True)
    page = write_report(adapter.parent)
    if not as_json:
        out.print(f"The report is {page}", highlight=False, soft_wrap=True)


@federation_app.command()
def status(kit: CoordinatorKit = COORDINATOR, as_json: Json = False) -> None:
    """The server, and which sites are connected."""
    from flapsam.federation.engines.nvflare.coordination import status as ask
    from flapsam.federation.engines.nvflare.kits import read_kit

    found = ask(read_kit(kit, "coordinator"))
    if as_json:
        return print_json(found)
    from flapsam.report import tables

    out.print(f"{found['server']}: up since {found['since']}, {len(found['jobs'])} jobs under way", highlight=False)
    rows = [{"site": name, "": "connected" if seen else "not there"} for name, seen in found["sites"].items()]
    out.print(tables.plain_table(rows))


@federation_app.command()
def stop(kit: CoordinatorKit = COORDINATOR, as_json: Json = False) -> None:
    """End the run under way; what is done is kept, and flapsam federation run goes on with it."""
    from flapsam.federation.engines.nvflare.coordination import stop as end
    from flapsam.federation.engines.nvflare.kits import read_kit

    jobs = end(read_kit(kit, "coordinator"))
    if as_json:
        return print_json({"ended": jobs})
    out.print(f"{len(jobs)} jobs ended" if jobs else "no job is under way", highlight=False)


def _serve(folder: Path, role: str, site_file: Path | None, unit: bool) -> None:
    from flapsam.federation.engines.nvflare.kits import read_kit
    from flapsam.federation.engines.nvflare.participant import serve
    from flapsam.federation.engines.nvflare.participant import unit as unit_of

    kit = read_kit(folder, role)  # type: ignore[arg-type]
    if unit:
        return out.print(unit_of(kit, site_file), highlight=False, markup=False, soft_wrap=True, end="")

    def say(text: str) -> None:
        notes.print(text, highlight=False, markup=False, soft_wrap=True)

    code = serve(kit, say, site_file=site_file)
    if code:
        raise FlapsamError(f"NVFLARE has ended with code {code}; {kit.folder / 'log.txt'} and output.txt there say why")
