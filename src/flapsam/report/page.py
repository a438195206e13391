"""The report: one HTML page about a run's folder, in light and dark. It opens from disk and loads nothing from elsewhere."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder, write_text
from flapsam.base.version import __version__
from flapsam.federation.hospitals.aggregates import pooled_dice
from flapsam.federation.hospitals.evaluation import names_of
from flapsam.federation.traffic import StrategyTraffic, full_packet_bytes, strategy_table
from flapsam.learning.metrics import Summary, summarise
from flapsam.report.cases import CaseKey, cases_of, read_volumes, subjects_of
from flapsam.report.figures.attendance import attendance
from flapsam.report.figures.cases import dice_per_case
from flapsam.report.figures.curves import dice_curves, losses
from flapsam.report.figures.drawing import chart_style
from flapsam.report.figures.gain import modes_by_site
from flapsam.report.figures.measures import all_measures
from flapsam.report.figures.phases import phases
from flapsam.report.figures.strips import strips
from flapsam.report.figures.traffic import traffic
from flapsam.report.own import own_adapters
from flapsam.report.run import TITLES, Run, Series, read_run
from flapsam.report.section import Block, CaseName, Section, Table
from flapsam.report.site_tests import by_round, mean_dices, name_of, site_tests
from flapsam.report.times import phase_times, site_times
from flapsam.report.units import NONE, between, number, size
from flapsam.run.config import SPLITS, RunConfig
from flapsam.run.ledger import RunEnded, nearly_final
from flapsam.run.observer import Observer
from flapsam.run.participation import participation
from flapsam.run.reading import write_config
from flapsam.sam import strategy
from flapsam.sites import Case
from flapsam.volumes import legend_of

Link = Callable[[str, str], str | None]
"""Site and case → the address at which the case opens; None if it cannot be opened."""


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page."""

    name: str
    value: str
    small: str = ""


def write_report(folder: Path, output: Path | None = None, *, images: bool = True, observer: Observer | None = None) -> Path:
    """Write the page of a run.

    Args:
        folder: the run's folder. The run may still be unfinished.
        output: the page's path; ``report/index.html`` in the folder if not given.
        images: whether the page shows slices of patients.
        observer: follows the work.

    Returns:
        The page's path.

    Raises:
        FlapsamError: there is no run, a file is damaged, or the page cannot be written.
    """
    run = read_run(folder)
    path = output or run.folder.report
    make_folder(path.parent)
    write_text(path, report_page(run, images=images, observer=observer or Observer()))
    return path


def report_page(run: Run, *, images: bool = True, link: Link | None = None, observer: Observer | None = None) -> str:
    """The page of a run as HTML.

    Args:
        run: the content of the run's folder.
        images: whether the page shows slices of patients.
        link: the addresses at which cases open; without it, case names are plain text.
        observer: follows the work.
    """
    cases = cases_of(run)
    federated = run.rounds("federated")
    with chart_style():
        sections = [
            modes_by_site(run.scores, subjects_of(cases)),
            own_adapters(run.events),
            all_measures(run.scores),
            site_tests(run.events, names_of(run.config)),
            dice_per_case(run.scores, run.classes),
            dice_curves({mode: run.validation(mode) for mode in run.modes}),
            traffic(run.bytes_up, run.bytes_down, run.delivered, federated, _strategies(run.config, federated)),
            losses({mode: run.fits(mode, lambda fit: fit.loss) for mode in run.modes}, run.config.training),
            phases(phase_times(run), site_times(run)),
            attendance(_answered(run), run.troubles, federated, participation(run.events).sentence()),
            _strips(run, cases, observer or Observer()) if images else None,
            _description(run),
        ]
    rounds = max((run.rounds(mode) for mode in run.modes), default=0)
    warning = (
        "" if run.finished else f"This run is not finished: {rounds} of {run.config.rounds.count} rounds are done so far."
    )
    return render(
        title=f"{run.folder.path.resolve().parent.name}/{run.name}",
        kind="flapsam report",
        notes=run.config.notes,
        warning=warning,
        about=_about(run),
        tiles=_tiles(run, rounds),
        sections=[section for section in sections if section],
        segments=legend_of(run.classes),
        link=link,
    )


def render(**content: Any) -> str:
    """Fill the page's template. Everything but charts and strips is escaped."""
    style = Markup((Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8"))
    return (
        pages()
        .get_template("page.html")
        .render(**{"link": None, "segments": (), **content}, style=style, version=__version__)
    )


def pages() -> Environment:
    """The environment of the HTML templates, which escapes all values."""
    environment = Environment(loader=PackageLoader("flapsam.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["casename"] = lambda value: isinstance(value, CaseName)
    return environment


def _answered(run: Run) -> Series:
    """Bytes of the packets that the server accepted in the federated rounds."""
    return run.fits("federated", lambda fit: fit.bytes_up)


def _strips(run: Run, cases: Mapping[CaseKey, Case], observer: Observer) -> Section | None:
    if not run.scores:
        return None
    mode, scores = next(iter(run.scores.items()))
    return strips(
        scores, lambda score: read_volumes(run, mode, cases, (score.site, score.case)), run.config.samples, observer
    )


def _strategies(config: RunConfig, rounds: int) -> list[StrategyTraffic]:
    """Traffic that the strategies would cause with this network and with adapters on the same projections."""
    try:
        return strategy_table(
            config.backbone.name,
            image_size=config.samples.size,
            classes=len(config.data.classes),
            rank=config.lora.rank,
            projections=config.lora.projections,
            rounds=max(rounds, 1),
        )
    except FlapsamError:
        # This version does not know the backbone, but the measured traffic is still worth showing.
        return []


def _about(run: Run) -> str:
    config = run.config
    low_rank = f", rank {config.lora.rank}" if strategy(config.strategy).lora else ""
    return (
        f"Segmentation of {', '.join(run.classes)} at {len(run.sites)} sites. Backbone {config.backbone.name}, "
        f"strategy {config.strategy}{low_rank}, aggregator {config.aggregator}, codec {config.compression.codec}, "
        f"preset {config.preset}, seed {config.seed}.{_secure(config)}{_private(config)}"
    )


def _secure(config: RunConfig) -> str:
    if not config.secure or "federated" not in config.modes:
        return ""
    return " Secure aggregation: in each round, the server learned the sum of the sites' changes, and no site's own."


def _private(config: RunConfig) -> str:
    privacy = config.privacy
    if privacy is None:
        return ""
    return (
        f" Differential privacy for every patient: ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g}. "
        "Only tensors with noise left the sites, so there are no losses, validation scores or counts."
    )


def _tiles(run: Run, rounds: int) -> list[Tile]:
    tiles = []
    pooled = {mode: run.pooled(mode) for mode in run.scores}
    for mode, summary in pooled.items():
        if summary:
            tiles.append(Tile(f"test Dice, {TITLES[mode]}", number(summary.mean_dice), _certainty(summary)))
    tested = by_round(run.events)
    for place, sites in tested.items():
        if whole := pooled_dice(mean_dices(sites)):
            several = f", {name_of(names_of(run.config), place)}" if len(tested) > 1 else ""
            about = f"{ends}, " if (ends := between(whole)) else ""
            tiles.append(Tile(f"test Dice at the sites{several}", number(whole.value), f"{about}{whole.patients} patients"))
    if not tiles:
        validated = run.validation("federated")
        last = [points[max(points)] for points in validated.values()]
        if last:
            tiles.append(Tile("validation Dice", number(sum(last) / len(last)), "latest, mean over the sites"))
    alone = {(score.site, score.case) for score in run.scores.get("local", ())}
    federated = summarise([score for score in run.scores.get("federated", ()) if (score.site, score.case) in alone])
    local = pooled.get("local")
    if local and federated.mean_dice is not None and local.mean_dice is not None:
        tiles.append(Tile("collaborative gain", f"{federated.mean_dice - local.mean_dice:+.3f}", "federated − local-only"))
    tiles.append(Tile("sites", str(len(run.sites)), f"{rounds} of {run.config.rounds.count} rounds"))
    if next(run.of(RunEnded), None) and (nearly := nearly_final(run.events)):
        tiles.append(
            Tile("traffic per site to 95 %", size(nearly.bytes_a_site), f"of the final Dice, in round {nearly.rounds}")
        )
    fits = sum(len(points) for points in _answered(run).values())
    if fits:
        ratio = 2 * full_packet_bytes(run.config) * fits / run.travelled
        tiles.append(
            Tile("traffic per site and round", size(run.travelled / fits), f"{ratio:,.1f} × less than full fine-tuning")
        )
    return tiles


def _certainty(summary: Summary) -> str:
    """The 95 % interval of a mean Dice, and the number of cases that it is over."""
    mean = summary.mean
    if mean is None:
        return f"{summary.cases} cases"
    some = "" if mean.cases == summary.cases else f"{mean.cases} of "
    ends = between(mean) + ", " * (mean.low is not None)
    return f"{ends}{some}{summary.cases} cases"


def _description(run: Run) -> Section:
    splits = sorted({split for joined in run.joined for split in joined.cases}, key=SPLITS.index)
    rows = [[joined.site, *(str(joined.cases.get(split, NONE)) for split in splits)] for joined in run.joined]
    environment = dict(run.environment)
    arguments = environment.pop("command", [])
    packages = environment.pop("packages", {})
    facts = [[name, str(value)] for name, value in environment.items()]
    versions = [[name, version] for name, version in packages.items()]
    # Between hospitals, every site configures the place of its own data.
    stayed = run.config.data.path == Path("/")
    place = "The data stayed at the sites." if stayed else f"The data were in {run.config.data.path}."
    again = f"flapsam {'federation run' if stayed else 'simulate'} run.yaml --set output=runs/again"
    if run.config.threads is None and "cores" in environment and not stayed:
        again += f" --set threads={environment['cores']}"
    command = shlex.join([Path(arguments[0]).name, *arguments[1:]]) if arguments else ""
    configuration = write_config(run.config.model_copy(update={"notes": ""}))
    return Section(
        "repeat",
        "Data, environment, and how to repeat the run",
        f"{place} With the same configuration, data, package versions and number of threads, the results are identical bit "
        "for bit.",
        tables=[
            Table("sites-table", "Cases of each site", ["site", *splits], rows),
            Table("environment-table", "Environment", ["item", "value"], facts + versions, text_columns=2),
        ],
        blocks=[
            Block("Command of this run", f"{command}\n", opened=True),
            Block("Command to repeat the run elsewhere, with the configuration below", f"{again}\n"),
            Block("run.yaml with all fields", configuration),
        ],
    )
