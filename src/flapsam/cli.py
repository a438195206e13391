"""The commands. Each reads its arguments, calls one function and prints its result; heavy imports happen inside."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flapsam import __version__
from flapsam.cli_federation import federation_app
from flapsam.console import (
    Assignments,
    Json,
    Quiet,
    Track,
    escaped,
    interrupted,
    interruptible,
    notes,
    observing,
    out,
    print_json,
    warn,
)
from flapsam.errors import FlapsamError

app = typer.Typer(
    help="Federated, parameter-efficient fine-tuning of the Segment Anything Model for medical volumes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Check data, or make some up.", no_args_is_help=True)
app.add_typer(data_app, name="data")
backbone_app = typer.Typer(help="Segment Anything Models to build on.", no_args_is_help=True)
app.add_typer(backbone_app, name="backbone")
app.add_typer(federation_app, name="federation")

Threads = Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")]


def main() -> None:
    """Run the command line; what the user did wrong is one sentence and exit code 2."""
    try:
        app()
    except FlapsamError as error:
        notes.print(f"[bold red]Error:[/] {escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="A new folder for everything.")] = Path("demo"),
    sites: Annotated[int, typer.Option(min=2)] = 4,
    cases: Annotated[int, typer.Option(min=4, help="At each site.")] = 10,
    assignments: Assignments = None,
) -> None:
    """Try everything without data: make up sites, train on them, segment and score; about 5 minutes on two cores."""
    import shlex

    from flapsam.experiments.demo import begin_demo, demo_commands

    changes = assignments or []
    begin_demo(folder, changes)
    for command in demo_commands(folder, sites=sites, cases=cases, assignments=changes):
        out.print(f"\n[bold]$ {escaped(shlex.join(['flapsam', *command]))}[/]", highlight=False, soft_wrap=True)
        if code := app(command, standalone_mode=False):
            raise typer.Exit(code)
    out.print(
        f"\nTo look at the cases in three planes and 3-D: flapsam view {folder / 'run'}", highlight=False, soft_wrap=True
    )


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="The data's folder, in any layout of `flapsam data list`.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN.yaml", help="What is written.")] = Path("run.yaml"),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Look at data and write a configuration for them, with a reason beside each choice."""
    from dataclasses import asdict

    from flapsam.experiments.init import initialise, minutes

    with observing() as observer:
        seen, estimate = initialise(data, output, observer)
    if as_json:
        return print_json({"run": str(output), **asdict(estimate)})
    out.print(output.read_text(), highlight=False, markup=False, soft_wrap=True, end="")
    out.print(
        f"\n{output} is written for {seen.cases} cases; about {minutes(estimate.seconds)} here. Go on with: "
        f"flapsam simulate {output}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    assignments: Assignments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Sites that are fitted side by side.")] = 1,
    track: Track = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune SAM across sites on this machine: volumes → adapter, label maps and scores."""
    from flapsam.config import read_config
    from flapsam.experiments.simulation import simulate as run
    from flapsam.report import tables
    from flapsam.report.page import write_report
    from flapsam.tracking import tracked

    configuration = read_config(config, assignments or [])
    advice = f"What is done is kept in {configuration.output}; go on with --resume."
    with interruptible(advice) as shown, tracked(shown, track, warn) as observer:
        results = run(configuration, resume=resume, workers=workers, observer=observer)
    if as_json:
        print_json(results.as_json())
    else:
        out.print(tables.dice_table(results))
        out.print(tables.class_table({mode: sites["pooled"] for mode, sites in results.summaries().items()}))
        if results.traffic:
            out.print(tables.traffic_table(results))
    # Last, so that the results are told whatever becomes of the page.
    with observing() as observer:
        page = write_report(results.folder, observer=observer)
    if not as_json:
        text = f"Adapters, label maps and the ledger are in {results.folder}, the report is {page}"
        out.print(text, highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folder of a run, or of several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PAGE.html",
            help="The page; report/index.html in the run's folder, or comparison.html.",
        ),
    ] = None,
    images: Annotated[bool, typer.Option(help="Put slices of the best, median and worst cases into the page.")] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a run's report as one HTML page that needs no network, or one that compares several runs."""
    from flapsam.report.comparison import write_comparison
    from flapsam.report.page import write_report

    if len(runs) > 1:
        page = write_comparison(runs, output or Path("comparison.html"))
    else:
        with observing() as observer:
            page = write_report(runs[0], output, images=images, observer=observer)
    if as_json:
        return print_json({"report": str(page)})
    out.print(f"The report is in {page}", highlight=False, soft_wrap=True)


@app.command()
def view(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_IMAGE", help="The folder of a run, or an image.")],
    case: Annotated[str | None, typer.Argument(help="Of the run: CASE or SITE/CASE; else its report opens.")] = None,
    prediction: Annotated[Path | None, typer.Option(help="A label map of the image.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Another one, to compare it with.")] = None,
    trained: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="RUN_OR_ADAPTER", help="Says what the image's label values are called."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="A free one if not given.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the address in a browser.")] = True,
) -> None:
    """Look at volumes with their label maps in a browser, from this machine alone, until Ctrl-C."""
    from flapsam.federation.folder import is_begun
    from flapsam.report.viewing import image_server, run_server

    is_run = is_begun(path)
    if is_run and (prediction or truth or trained):
        raise FlapsamError(f"{path}: a run has its own label maps; leave out --prediction, --truth and --adapter")
    if case and not is_run:
        raise FlapsamError(f"{path}: there is no run here, so no case {case}; give a run's folder, or an image alone")
    with interruptible("The address is closed.") as observer:
        if is_run:
            server, address = run_server(path, case, port, observer)
        else:
            label_maps = [(name, file) for name, file in (("prediction", prediction), ("truth", truth)) if file]
            server, address = image_server(path, label_maps, trained, port)
        out.print(f"Open {address}\nIt answers on this machine alone, until Ctrl-C.", highlight=False, soft_wrap=True)
        if browser:
            import webbrowser

            webbrowser.open(address)
        server.run()


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, which may be under way elsewhere.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on showing it until the run ends.")] = False,
    as_json: Json = False,
) -> None:
    """Where a run stands, by its ledger: rounds, sites, Dice, bytes, what went wrong, time left."""
    from flapsam.report.status import as_json_of, read_status, show, watch

    if follow and as_json:
        raise FlapsamError("--follow: leave out --json, which prints where the run stands now")
    with interrupted("The run is left alone."):
        if as_json:
            return print_json(as_json_of(read_status(run)))
        (watch if follow else show)(run, out)


@app.command()
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    to: Annotated[list[str], typer.Option("--to", metavar="TRACKER", help="tensorboard or mlflow; repeatable.")],
) -> None:
    """Write a run's figures from its ledger for TensorBoard or MLflow; what is there already is not written twice."""
    from flapsam.tracking import track_run

    for place in track_run(run, to):
        out.print(place, highlight=False, markup=False, soft_wrap=True)


@app.command()
def bench(
    config: Annotated[
        str, typer.Argument(metavar="RUN.yaml", help="The run, whose field bench says what is compared; or known settings.")
    ],
    data: Annotated[Path | None, typer.Option(help="The data's folder, in the place of data.path.")] = None,
    assignments: Assignments = None,
    only: Annotated[str, typer.Option(help="Only cells whose names fit, such as 'flap*'.")] = "*",
    minutes: Annotated[float | None, typer.Option(min=0, help="No cell is begun after these.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare strategies, modes, aggregators and seeds in one table; what is missing is computed."""
    from flapsam.experiments.bench import bench as run
    from flapsam.experiments.settings import read_settings
    from flapsam.report.bench_figure import draw
    from flapsam.report.bench_table import bench_table, write_tables

    configuration = read_settings(config, data, assignments or [])
    with interruptible(f"What is done is kept in {configuration.output}; the same command goes on.") as observer:
        result = run(configuration, only=only, minutes=minutes, observer=observer)
    write_tables(result)
    draw(result)
    if as_json:
        from dataclasses import asdict

        return print_json([asdict(row) for row in result.rows])
    out.print(bench_table(result))
    out.print(
        f"All columns are in bench.md, .csv and .json, the picture in bench.svg, in {result.folder}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def suggest(
    config: Annotated[str, typer.Argument(metavar="RUN.yaml", help="As flapsam bench was given it.")],
    data: Annotated[Path | None, typer.Option(help="The data's folder, in the place of data.path.")] = None,
    assignments: Assignments = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Dice that may be lost.")] = 0.01,
    as_json: Json = False,
) -> None:
    """Name the cheapest of a bench's choices whose Dice is close to the best."""
    from dataclasses import asdict

    from flapsam.experiments.bench import read_bench
    from flapsam.experiments.bench import suggest as choose
    from flapsam.experiments.settings import read_settings

    rows = read_bench(read_settings(config, data, assignments or [])).rows
    chosen, best = choose(rows, tolerance)
    if as_json:
        return print_json({"suggested": asdict(chosen), "best": asdict(best)})
    for what, row in (("best", best), (f"cheapest within {tolerance:g}", chosen)):
        out.print(f"{what}: {row.row.name}, Dice {row.mean_dice:.3f}, {row.parameters:,} parameters", highlight=False)
    missing = [row.row.name for row in rows if row.row.mode == "federated" and row.done < row.planned]
    if missing:
        notes.print(f"Not all cells are there, so this may change: {'; '.join(missing)}", highlight=False, soft_wrap=True)


@app.command()
def predict(
    trained: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run or of an adapter.")],
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES...",
            help="NIfTI, NRRD, MetaImage or DICOM files; folders, searched to the bottom; or lists of paths (.txt).",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label maps.")],
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what is there already, made in the same way.")] = False,
    series: Annotated[
        str | None, typer.Option(help="Of folders with several DICOM series: number, description or UID, such as '*T2*'.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of one folder of sites, only train, val or test cases.")] = None,
    flips: Annotated[
        str,
        typer.Option(metavar="AXES", help="Average over mirror images, such as x (left-right); each axis doubles the time."),
    ] = "",
    planes: Annotated[
        bool, typer.Option("--planes", help="Average over sagittal, coronal and axial slices; about three times the time.")
    ] = False,
    largest: Annotated[bool, typer.Option("--largest", help="Keep the largest connected component of each class.")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="Fill holes in each class.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write a probability map a class, too, as one 4-D NIfTI file.")
    ] = False,
    dicom_seg: Annotated[bool, typer.Option(help="Write a DICOM segmentation beside NIfTI for DICOM images.")] = True,
    weights: Annotated[Path | None, typer.Option(help="The backbone's checkpoint, if the adapter needs one.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "cpu",
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16, fp16 or auto, the fastest by a short measurement; on a CPU fp32."),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Segment volumes: a label map an image, in the image's own grid and format."""
    if split not in (None, "train", "val", "test"):
        raise FlapsamError(f"--split {split}: choose train, val or test")
    from flapsam.device import set_up_torch
    from flapsam.environment import default_threads
    from flapsam.images import find_cases, find_images
    from flapsam.inference import Options
    from flapsam.model import load
    from flapsam.prediction import VOLUMES, predict_images
    from flapsam.trained import find_trained

    options = Options(flips=flips, planes=planes, largest=largest, fill=fill, probabilities=probabilities)
    found = find_trained(trained)
    if split is None:
        jobs = find_images(images, found, series=series, output=output)
    elif len(images) == 1:
        jobs = find_cases(images[0], found, split)  # type: ignore[arg-type]
    else:
        raise FlapsamError("--split: give one folder of sites")
    set_up_torch(threads or default_threads(), deterministic=True)
    model = load(trained, weights=weights, device=device, precision=precision)  # type: ignore[arg-type]
    with interruptible(f"What is done is kept in {output}; go on with --resume.") as observer:
        outcomes = list(
            predict_images(
                model,
                found,
                jobs,
                output,
                options=options,
                segmentation=dicom_seg,
                resume=resume,
                observer=observer,
            )
        )
    failed = [outcome for outcome in outcomes if outcome.error]
    written = [outcome for outcome in outcomes if not outcome.error]
    if as_json:
        print_json(
            {
                "written": [str(path) for outcome in written for path in outcome.written],
                "images": [outcome.as_json() for outcome in outcomes],
                "volumes": str(output / VOLUMES),
            }
        )
    else:
        label_maps = "1 label map is" if len(written) == 1 else f"{len(written)} label maps are"
        text = f"{label_maps} in {output}, volumes in millilitres in {output / VOLUMES}"
        out.print(text, highlight=False, soft_wrap=True)
    if failed:
        notes.print(f"[bold red]{len(failed)} of {len(outcomes)} images not segmented:[/]", highlight=False)
        for outcome in failed:
            notes.print(f"- {escaped(outcome.error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def export(
    trained: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run or of an adapter.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the network.")],
    form: Annotated[str, typer.Option("--format", help="transformers or onnx.")] = "transformers",
    weights: Annotated[Path | None, typer.Option(help="The backbone's checkpoint, if the adapter needs one.")] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its backbone and write the network for other software."""
    if form not in ("transformers", "onnx"):
        raise FlapsamError(f"--format {form}: choose transformers or onnx")
    from flapsam.export import export as write
    from flapsam.trained import find_trained

    found = find_trained(trained)
    written = write(found.folder, output, form=form, weights=weights or found.weights)
    if as_json:
        return print_json({"written": [str(path) for path in written]})
    for path in written:
        out.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps: CASE.nii.gz or SITE/CASE.nii.gz.")],
    labels: Annotated[Path, typer.Argument(help="Folder of the truth: the same, or SITE/labels/CASE.nii.gz.")],
    trained: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="RUN_OR_ADAPTER", help="Says which values in LABELS stand for which class."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score label maps against the truth: 3-D Dice and 95 % Hausdorff distance per case, site and class."""
    from dataclasses import asdict

    from flapsam.evaluation import evaluate as score
    from flapsam.metrics import by_site, summarise
    from flapsam.report import tables
    from flapsam.trained import find_trained

    with observing() as observer:
        observer.begin("scores", 0)
        scores = score(predictions, labels, find_trained(trained) if trained else None, on_case=observer.step)
        observer.end()
    if as_json:
        sites = {site: asdict(summarise(part)) for site, part in by_site(scores).items()}
        cases = [asdict(case) for case in scores]
        return print_json({"pooled": asdict(summarise(scores)), "sites": sites, "cases": cases})
    out.print(tables.scores_table(scores))


@app.command()
def traffic(
    config: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="A run, whose packets are weighed before it begins.")
    ] = None,
    assignments: Assignments = None,
    backbone: Annotated[str, typer.Option(help="sam-vit-b, -l, -h or sam-tiny.")] = "sam-vit-b",
    size: Annotated[int | None, typer.Option(help="Side of the network's input in pixels.")] = None,
    classes: Annotated[int, typer.Option(min=1, help="Without background.")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank adapters.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 100,
    as_json: Json = False,
) -> None:
    """Predict what a run will send; or, without one, what each strategy trains and sends uncompressed."""
    from dataclasses import asdict

    from flapsam.report import tables
    from flapsam.traffic import predict_traffic, strategy_table

    if config is not None:
        from flapsam.config import read_config
        from flapsam.federation.preparation import resolve

        predicted = predict_traffic(resolve(read_config(config, assignments or [])))
        if as_json:
            return print_json([{**asdict(row), "ratio": row.ratio} for row in predicted])
        return out.print(tables.prediction_table(predicted))
    rows = strategy_table(backbone, image_size=size, classes=classes, rank=rank, rounds=rounds)
    if as_json:
        return print_json([asdict(row) for row in rows])
    out.print(f"{backbone}, {classes} classes, rank {rank}, {rounds} rounds, one client, up and down", highlight=False)
    out.print(tables.strategy_table(rows))


@app.command()
def memory(
    backbone: Annotated[str, typer.Option(help="sam-vit-b, -l, -h or sam-tiny.")] = "sam-vit-b",
    size: Annotated[int | None, typer.Option(help="Side of the network's input in pixels.")] = None,
    strategy: Annotated[str, typer.Option(help="What trains.")] = "flap",
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank adapters.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    as_json: Json = False,
) -> None:
    """What memory a training step takes, measured here on random weights: by slices at once, and with checkpointing."""
    if precision not in ("fp32", "bf16"):
        raise FlapsamError(f"--precision {precision}: choose fp32 or bf16")
    from dataclasses import asdict

    from flapsam.device import find_device
    from flapsam.memory import memory_table
    from flapsam.report import tables

    place = find_device(device)
    rows = memory_table(backbone, image_size=size, strategy=strategy, rank=rank, device=place, precision=precision)
    if as_json:
        return print_json([asdict(row) for row in rows])
    out.print(tables.memory_table(rows))


@app.command()
def doctor(as_json: Json = False) -> None:
    """What flapsam finds on this machine."""
    import psutil
    import torch

    from flapsam.device import find_device
    from flapsam.environment import environment

    found = {
        **environment(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "disk_free_gib": round(psutil.disk_usage(".").free / 2**30, 1),
        "device": str(find_device("auto")),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
    del found["command"]
    if as_json:
        return print_json(found)
    for name, value in found.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        out.print(f"{name.replace('_', ' '):>16}  {text or 'none'}", highlight=False, soft_wrap=True)


@data_app.command("list")
def list_data(as_json: Json = False) -> None:
    """Data sets and layouts that flapsam reads."""
    from flapsam.report import tables
    from flapsam.sites import DATASETS

    rows = [{"name": d.name, "what": d.title, "modality": d.modality, "files": d.layout} for d in DATASETS.values()]
    if as_json:
        return print_json(rows)
    out.print(tables.plain_table(rows))


@data_app.command("info")
def info_of_data(
    name: Annotated[str, typer.Argument(help="As `flapsam data list` names it.")], as_json: Json = False
) -> None:
    """What a data set is: its licence, source, size, sites and classes."""
    from flapsam.datasets import about
    from flapsam.report import tables

    rows = about(name)
    if as_json:
        return print_json(rows)
    out.print(tables.plain_table([{"": key, name: value} for key, value in rows.items()]))


@data_app.command("get")
def get_data(
    name: Annotated[str, typer.Argument(help="As `flapsam data list` names it.")],
    folder: Annotated[Path, typer.Argument(help="Where it is unpacked.")],
    quiet: Quiet = False,
) -> None:
    """Download a data set that anyone may have, or say how to get it."""
    from flapsam.datasets import fetch_data

    with observing() as observer:
        path = fetch_data(name, folder, observer)
    out.print(f"{name} is in {path}", highlight=False, soft_wrap=True)


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="The data's folder, in any layout of `flapsam data list`.")],
    config: Annotated[Path | None, typer.Option(metavar="RUN.yaml", help="Says which label values are classes.")] = None,
    labels: Annotated[list[int] | None, typer.Option("--label", help="A label value that may occur; repeatable.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read every case and list every problem, before any training."""
    from flapsam.check import check_data
    from flapsam.config import read_config

    with observing() as observer:
        sites, found = check_data(path, read_config(config) if config else None, labels or [], observer)
    count, values = sum(sites.values()), sorted(found.values)
    if as_json:
        print_json({"sites": sites, "label_values": values, "problems": found.problems})
    else:
        for problem in found.problems:
            out.print(problem, highlight=False, soft_wrap=True, markup=False)
        out.print(f"label values: {', '.join(map(str, values)) or 'none'}", highlight=False, soft_wrap=True)
        out.print(f"{count} cases at {len(sites)} sites, {len(found.problems)} problems", highlight=False)
    if found.problems:
        raise typer.Exit(2)


@data_app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Where the sites are written.")],
    sites: Annotated[int, typer.Option(min=1)] = 4,
    cases: Annotated[int, typer.Option(min=2, help="At each site; three in ten are for the test.")] = 10,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Make up sites: CT-like abdomens with kidneys and tumours."""
    from flapsam.experiments.phantom import make_phantom

    with observing() as observer:
        observer.begin("phantoms", sites * cases)
        make_phantom(folder, sites=sites, cases=cases, seed=seed, on_case=observer.step)
        observer.end()
    out.print(f"{sites * cases} cases at {sites} sites written to {folder}", highlight=False, soft_wrap=True)


@backbone_app.command("list")
def list_backbones(as_json: Json = False) -> None:
    """Backbones known by name, and where their weights are."""
    from flapsam.backbones import found
    from flapsam.report import tables

    rows = found()
    if as_json:
        return print_json(rows)
    out.print(tables.plain_table(rows))


@backbone_app.command()
def get(name: Annotated[str, typer.Argument(help="As `flapsam backbone list` names it.")], quiet: Quiet = False) -> None:
    """Download a backbone's weights; a broken download is gone on with."""
    from flapsam.backbones import fetch

    with observing() as observer:
        path = fetch(name, observer)
    out.print(f"{name} is in {path}", highlight=False, soft_wrap=True)


@backbone_app.command()
def info(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint: .pth, .safetensors, or a folder of transformers.")],
    as_json: Json = False,
) -> None:
    """What a checkpoint is."""
    from flapsam.backbones import describe
    from flapsam.report import tables

    description = describe(checkpoint)
    if as_json:
        return print_json(description)
    out.print(tables.plain_table([{"": name, checkpoint.name: str(value)} for name, value in description.items()]))


@app.command()
def pretrain(
    folder: Annotated[Path, typer.Argument(help="Where weights, log and state are written.")],
    steps: Annotated[int, typer.Option(min=1)] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Scenes a step.")] = 16,
    seed: int = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Twenty steps, to see that it runs.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train sam-tiny from nothing on synthetic images: how the weights that ship with flapsam were made."""
    from flapsam.environment import default_threads
    from flapsam.experiments.pretraining import Recipe
    from flapsam.experiments.pretraining import pretrain as run

    recipe = Recipe(steps=20, batch=4, warmup=5, seed=seed) if quick else Recipe(steps=steps, batch=batch, seed=seed)
    length = "--quick" if quick else f"--steps {steps} --batch {batch}"
    command = f"flapsam pretrain {length} --seed {seed}"
    with interruptible(f"Go on with --resume from the last state in {folder}.") as observer:
        scores = run(folder, recipe, command=command, threads=threads or default_threads(), resume=resume, observer=observer)
    if as_json:
        return print_json(scores)
    for task, value in scores.items():
        out.print(f"{task:>16}  held-out IoU {value:.3f}", highlight=False)


if __name__ == "__main__":
    main()
