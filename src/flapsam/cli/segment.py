"""Commands that use an adapter: ``predict``, ``evaluate``, ``export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flapsam.cli.console import (
    Checkpoint,
    Device,
    Json,
    Quiet,
    Threads,
    TrainedArgument,
    TrainedOption,
    interruptible,
    notes,
    observing,
    out,
    print_json,
    say,
    warn,
)

app = typer.Typer()


@app.command()
def predict(
    trained: TrainedArgument,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES...",
            help="NIfTI, NRRD, MetaImage or DICOM files, folders with such files at any depth, or lists of paths (.txt).",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label maps.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip images that this adapter has already segmented with these options.")
    ] = False,
    series: Annotated[
        str | None,
        typer.Option(help="DICOM series to use if a folder has several: number, description or UID, such as '*T2*'."),
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(help="Segment only the cases of this split. IMAGES must then be one folder of sites."),
    ] = None,
    flips: Annotated[
        str,
        typer.Option(metavar="AXES", help="Average over mirror images, such as x (left-right). Each axis doubles the time."),
    ] = "",
    planes: Annotated[
        bool,
        typer.Option("--planes", help="Average over sagittal, coronal and axial slices. Triples the time."),
    ] = False,
    largest: Annotated[bool, typer.Option("--largest", help="Keep the largest connected component of each class.")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="Fill holes in each class.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write class probabilities, as one 4-D NIfTI file per image.")
    ] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also write the uncertainty of every voxel, from 0 to 1.")
    ] = False,
    confidence: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Calibration from flapsam calibrate, to tell the expected Dice of each image."),
    ] = None,
    dicom_seg: Annotated[
        bool, typer.Option(help="For DICOM images, write a DICOM segmentation beside the NIfTI file.")
    ] = True,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "auto"],
        typer.Option(help="auto is bf16 on a GPU that computes in it, fp16 on an older one, and fp32 elsewhere."),
    ] = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Segment volumes. Each image gets one label map, on its own grid and in its own format."""
    from flapsam.adapters.prediction import predict as run
    from flapsam.learning.inference import PredictionOptions
    from flapsam.volumes import sentences

    with interruptible(f"Finished label maps are in {output}; add --resume to continue.") as observer:
        predictions = run(
            trained,
            images,
            output,
            split=split,
            series=series,
            options=PredictionOptions(flips, planes, largest, fill, probabilities, uncertainty),
            confidence=confidence,
            dicom_seg=dicom_seg,
            resume=resume,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            threads=threads,
            observer=observer,
        )
    if as_json:
        print_json(predictions.as_json())
    else:
        count = len(predictions.written)
        label_maps = "1 label map is" if count == 1 else f"{count} label maps are"
        say(f"{label_maps} in {output}, volumes in millilitres in {predictions.volumes}")
        for sentence in sentences(predictions.left_out):
            warn(sentence)
        for outcome in predictions.unusual:
            assert outcome.confidence
            warn(f"{outcome.job.image}: is unlike the images of the calibration ({'; '.join(outcome.confidence.unusual)})")
    if predictions.failed:
        failed, total = len(predictions.failed), len(predictions.outcomes)
        notes.print(f"[bold red]{failed} of {total} images were not segmented:[/]", highlight=False)
        for outcome in predictions.failed:
            warn(f"- {outcome.error}")
        raise typer.Exit(1)


@app.command()
def calibrate(
    trained: TrainedArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Calibration to write.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of labelled cases that the adapter was not trained on.")
    ] = None,
    flips: Annotated[str, typer.Option(metavar="AXES", help="As in flapsam predict.")] = "",
    planes: Annotated[bool, typer.Option("--planes", help="As in flapsam predict.")] = False,
    largest: Annotated[bool, typer.Option("--largest", help="As in flapsam predict.")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="As in flapsam predict.")] = False,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "auto"], typer.Option(help="Precision of the network, as in flapsam predict.")
    ] = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Learn from labelled cases a label map's expected Dice, and which images are usual.

    An adapter of a run is calibrated on the run's validation cases, unless --data names others. The file holds statistics
    of the cases.
    """
    from flapsam.experiments.calibration import calibrate as learn
    from flapsam.learning.inference import PredictionOptions
    from flapsam.report import tables
    from flapsam.report.units import number

    with interruptible("Nothing was written.") as observer:
        outcome = learn(
            trained,
            output,
            data,
            checkpoint=checkpoint,
            options=PredictionOptions(flips, planes, largest, fill),
            device=device,
            precision=precision,
            threads=threads,
            observer=observer,
        )
    if as_json:
        return print_json(outcome.as_json())
    for table in tables.calibration_tables(outcome):
        out.print(table)
    brier, error = number(outcome.brier), number(outcome.calibration_error)
    say(f"Over these voxels, the Brier score is {brier}, and the expected calibration error {error}")
    say(f"Wrote {output}, which knows {outcome.images} images")
    say(f"Next: flapsam predict {trained} IMAGES -o OUT --confidence {output}")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps: CASE.nii.gz or SITE/CASE.nii.gz.")],
    labels: Annotated[
        Path, typer.Argument(help="Folder of ground-truth label maps: the same names, or SITE/labels/CASE.nii.gz.")
    ],
    trained: TrainedOption = None,
    missing: Annotated[
        Literal["error", "zero", "leave-out"],
        typer.Option(help="A case without a prediction is an error, has the Dice 0, or is left out."),
    ] = "error",
    absent: Annotated[
        Literal["none", "one"] | None,
        typer.Option(help="Dice of a class that is in neither label map. By default as in the adapter's run, or none."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, max=1000, help="Largest distance in mm between surfaces that counts as agreement.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=CLASS,CLASS", help="Union of classes to score beside them. Repeatable."),
    ] = None,
    lesion: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Class or region of which a case may have several parts. Repeatable."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score label maps against the ground truth: Dice, surface Dice, distances in mm and volumes, with intervals.

    Tolerance, regions and lesions are by default those of the adapter's run.
    """
    from flapsam.adapters.evaluation import evaluate as score
    from flapsam.adapters.evaluation import evaluation_of
    from flapsam.learning.metrics import as_json_of
    from flapsam.report import tables

    with observing() as observer:
        evaluation = evaluation_of(trained, tolerance, region or (), lesion or ())
        scores = score(
            predictions, labels, trained, missing=missing, absent=absent, evaluation=evaluation, observer=observer
        )
    if as_json:
        return print_json(as_json_of(scores))
    for table in tables.scores_tables(scores):
        out.print(table)


@app.command()
def export(
    trained: TrainedArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the network.")],
    form: Annotated[Literal["transformers", "onnx"], typer.Option("--format", help="Format to write.")] = "transformers",
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its backbone and write the network for other software."""
    from flapsam.adapters.export import export as write

    written = write(trained, output, form=form, checkpoint=checkpoint)
    if as_json:
        return print_json({"written": [str(path) for path in written]})
    for path in written:
        say(str(path))
