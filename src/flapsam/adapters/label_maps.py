"""Segment images with a trained adapter and write their label maps. A broken image does not stop the others.

While the network segments a volume, the next one is read and the label map of the previous one is written.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapsam.adapters.confidence import CaseConfidence, Confidence
from flapsam.adapters.images import Job
from flapsam.adapters.model import Model
from flapsam.adapters.trained import Trained
from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import csv_cell
from flapsam.base.files import check_writable, write_text
from flapsam.base.prefetch import ahead
from flapsam.base.version import __version__
from flapsam.learning.inference import Prediction, PredictionOptions
from flapsam.run.ledger import LabelMapWritten, Ledger
from flapsam.run.observer import Observer
from flapsam.volumes import Legend, Series, Volume, itk_snap, read_image, write_fractions, write_labels

RECORD, VOLUMES, DESCRIPTIONS = "predictions.jsonl", "volumes.csv", "labels.txt"


@dataclass(frozen=True)
class Outcome:
    """Outcome of segmenting one image."""

    job: Job
    written: tuple[Path, ...] = ()
    """Files written for the image, the label map first."""
    ml: dict[str, float] = field(default_factory=dict)
    """Volume of each class in millilitres."""
    confidence: CaseConfidence | None = None
    """How much the label map can be trusted; None without a calibration."""
    error: str = ""
    """Reason why the image was not segmented, empty if it was."""

    def as_json(self) -> dict[str, Any]:
        """The outcome as JSON for other programs."""
        image = str(self.job.image)
        if self.error:
            return {"image": image, "error": self.error}
        judged = asdict(self.confidence) if self.confidence else None
        return {"image": image, "written": [str(path) for path in self.written], "ml": self.ml, "confidence": judged}


@dataclass(frozen=True)
class Segmented:
    """A segmented image."""

    prediction: Prediction
    confidence: CaseConfidence | None


def predict_images(
    model: Model,
    trained: Trained,
    jobs: list[Job],
    output: Path,
    *,
    options: PredictionOptions = PredictionOptions(),
    segmentation: bool = True,
    confidence: Confidence | None = None,
    resume: bool = False,
    observer: Observer = Observer(),
) -> Iterator[Outcome]:
    """Write a label map for each image, on the image's own grid and in its format and header geometry.

    The output folder also gets ``labels.txt`` (names and colours for ITK-SNAP), ``predictions.jsonl`` (the ledger) and, at
    the end, ``volumes.csv`` (volume of each class in millilitres).

    Args:
        model: the network with its adapter.
        trained: the adapter's folder.
        jobs: the images.
        output: folder for the label maps.
        options: optional steps beyond predicting every slice once.
        segmentation: whether DICOM images also get a DICOM segmentation, beside the NIfTI label map.
        confidence: judges every label map, if given.
        resume: skip images that the same adapter has segmented into this folder with the same options.
        observer: follows the images.

    Yields:
        The outcome of every image, first of the skipped ones, then of the others in the order of ``jobs``. An image that
        cannot be read or a label map that cannot be written does not stop the others.

    Raises:
        FlapsamError: the output folder cannot be written.
    """
    check_writable(output)
    write_text(output / DESCRIPTIONS, itk_snap(model.legend))
    ledger = Ledger(output / RECORD)
    options = replace(options, confidence=confidence is not None)
    method = _fingerprint(model, trained, options, confidence)
    done = _done(ledger, output, method) if resume else {}
    skipped, remaining = [], []
    for job in jobs:
        event = done.get(job.stem.as_posix())
        if event and not job.fault and event.files == _files_of(job):
            skipped.append(Outcome(job, tuple(output / name for name in event.written), event.ml, _judged(event)))
        else:
            remaining.append(job)
    observer.begin("label maps", len(jobs), len(skipped))
    try:
        yield from skipped
        for outcome in _outcomes(model, remaining, output, options, segmentation, confidence, observer):
            yield outcome if outcome.error else _recorded(outcome, ledger, output, method)
    finally:
        try:
            _write_volumes(output, ledger, model.card.classes)
        except FlapsamError as error:
            observer.say(str(error))
        observer.end()


def _outcomes(
    model: Model,
    jobs: list[Job],
    output: Path,
    options: PredictionOptions,
    segmentation: bool,
    confidence: Confidence | None,
    observer: Observer,
) -> Iterator[Outcome]:
    """Segment images, while the next one is read and the previous label map is written."""
    writing: Future[Outcome] | None = None
    with ThreadPoolExecutor(1) as writer, closing(ahead(_read(jobs), depth=1)) as volumes:
        for job, volume in volumes:
            result = volume
            if isinstance(volume, Volume):
                result = _tried(job, _segment, model, job, volume, options, confidence, observer)
            if writing is not None:
                yield writing.result()
            if isinstance(volume, Volume) and isinstance(result, Segmented):
                writing = writer.submit(_write, job, result, volume.affine, output, model.legend, segmentation)
            else:
                writing = None
                observer.step()
                yield Outcome(job, error=str(result))
            # The next volume is already in memory, so this one is released.
            del volume, result
        if writing is not None:
            yield writing.result()


def _read(jobs: Iterable[Job]) -> Iterator[tuple[Job, Volume | str]]:
    """Yield every job with its volume, or with the reason why it has none."""
    for job in jobs:
        yield job, job.fault or _tried(job, read_image, job.image, *job.others)


def _segment(
    model: Model,
    job: Job,
    volume: Volume,
    options: PredictionOptions,
    confidence: Confidence | None,
    observer: Observer,
) -> Segmented:
    try:
        found = model.segment(volume, options, site=job.site, on_slices=lambda count, of: observer.step(count / of))
        return Segmented(found, confidence.judge(model, volume, found.expected, job.site) if confidence else None)
    except FlapsamError as error:
        raise FlapsamError(f"{job.image}: {error}") from error


def _write(
    job: Job,
    segmented: Segmented,
    affine: NDArray[np.float64],
    output: Path,
    legend: Legend,
    segmentation: bool,
) -> Outcome:
    """Write all files of an image, or none."""
    written: list[Path] = []
    prediction = segmented.prediction

    def write() -> None:
        stem = output / job.stem
        written.extend(write_labels(prediction.labels, job.image, affine, stem, legend, segmentation=segmentation))
        for what, fractions in (("probabilities", prediction.probabilities), ("uncertainty", prediction.uncertainty)):
            if fractions is not None:
                path = output / what / job.stem.with_name(job.stem.name + ".nii.gz")
                write_fractions(fractions, job.image, affine, path, f"flapsam {what}")
                written.append(path)

    error = _tried(job, write)
    if error:
        return _withdrawn(Outcome(job, tuple(written)), error)
    # Voxels are counted slice by slice, because bincount converts each to eight bytes.
    slices = np.moveaxis(prediction.labels, 2, 0)
    voxels = np.sum([np.bincount(labels.ravel(), minlength=len(legend) + 1) for labels in slices], axis=0)
    ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    volumes = {segment.name: round(voxels[segment.value] * ml, 6) for segment in legend}
    return Outcome(job, tuple(written), volumes, segmented.confidence)


def _recorded(outcome: Outcome, ledger: Ledger, output: Path, method: str) -> Outcome:
    """Record an outcome in the ledger. If that fails, remove the image's files and return the failure."""
    event = LabelMapWritten(
        case=outcome.job.stem.as_posix(),
        image=str(outcome.job.image),
        files=_files_of(outcome.job),
        method=method,
        written=[path.relative_to(output).as_posix() for path in outcome.written],
        ml=outcome.ml,
        confidence=asdict(outcome.confidence) if outcome.confidence else None,
    )
    try:
        ledger.write(event)
    except FlapsamError as error:
        return _withdrawn(outcome, f"{outcome.job.image}: {error}")
    return outcome


def _withdrawn(outcome: Outcome, error: str) -> Outcome:
    """Remove the files written for an image and return its failure."""
    for path in outcome.written:
        path.unlink(missing_ok=True)
    return Outcome(outcome.job, error=error)


def _tried(job: Job, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, and return its result or a sentence on why it failed. One image must not stop the others."""
    try:
        return function(*arguments)
    except FlapsamError as error:
        return str(error)
    except Exception as error:
        return f"{job.image}: unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"


def _fingerprint(model: Model, trained: Trained, options: PredictionOptions, confidence: Confidence | None) -> str:
    """SHA-256 of everything that label maps and their confidence depend on, except the images."""
    digest = hashlib.sha256(json.dumps([asdict(options), model.precision, __version__]).encode())
    digest.update(confidence.digest.encode() if confidence else b"")
    for path in sorted(trained.folder.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _files_of(job: Job) -> list[list[Any]]:
    """Paths, sizes and modification times of an image's files."""
    files = job.image.files if isinstance(job.image, Series) else (job.image, *job.others)
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.exists()]


def _judged(event: LabelMapWritten) -> CaseConfidence | None:
    judged = event.confidence
    return CaseConfidence(**{**judged, "unusual": tuple(judged["unusual"])}) if judged else None


def _newest(ledger: Ledger) -> dict[str, LabelMapWritten]:
    """The newest label map of each case."""
    return {event.case: event for event in ledger.events() if isinstance(event, LabelMapWritten)}


def _done(ledger: Ledger, output: Path, method: str) -> dict[str, LabelMapWritten]:
    """The newest label maps that this method produced and whose files all exist."""
    return {
        case: event
        for case, event in _newest(ledger).items()
        if event.method == method and all((output / name).exists() for name in event.written)
    }


def _write_volumes(output: Path, ledger: Ledger, classes: Sequence[str]) -> None:
    """Write a table with one row for every image that was ever segmented into this folder."""
    table, newest = io.StringIO(), sorted(_newest(ledger).items())
    rows = csv.writer(table, lineterminator="\n")
    judged = any(event.confidence for _, event in newest)
    head = ["expected_dice", "expected_dice_low", "expected_dice_high", "unusual"] if judged else []
    rows.writerow(["case", "image", "label_map", *(csv_cell(f"{name} (ml)") for name in classes), *head])
    for case, event in newest:
        texts = [csv_cell(text) for text in (case, event.image, event.written[0])]
        found = _judged(event)
        dices = (found.dice, found.low, found.high) if found else (None, None, None)
        told = ["" if value is None else f"{value:.3f}" for value in dices]
        cells = [*told, csv_cell("; ".join(found.unusual)) if found else ""] if judged else []
        rows.writerow([*texts, *(event.ml.get(name, "") for name in classes), *cells])
    write_text(output / VOLUMES, table.getvalue())
