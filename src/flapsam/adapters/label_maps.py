"""Images → label maps on disk, with a trained adapter: one after the other, past those that are broken.

While a volume is in the network, the next one is read and the last one's label map is written.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapsam.adapters.images import Job
from flapsam.adapters.model import Model
from flapsam.adapters.trained import Trained
from flapsam.base.errors import FlapsamError
from flapsam.base.files import check_writable, write_text
from flapsam.base.prefetch import ahead
from flapsam.base.version import __version__
from flapsam.learning.inference import Prediction, PredictionOptions
from flapsam.run.ledger import LabelMapWritten, Ledger
from flapsam.run.observer import Observer
from flapsam.volumes import Legend, Series, Volume, itk_snap, read_image, write_labels, write_probabilities

RECORD, VOLUMES, DESCRIPTIONS, PROBABILITIES = "predictions.jsonl", "volumes.csv", "labels.txt", "probabilities"


@dataclass(frozen=True)
class Outcome:
    """What became of an image."""

    job: Job
    written: tuple[Path, ...] = ()
    """First the label map."""
    ml: dict[str, float] = field(default_factory=dict)
    """Class → volume."""
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """For other programs."""
        image = str(self.job.image)
        if self.error:
            return {"image": image, "error": self.error}
        return {"image": image, "written": [str(path) for path in self.written], "ml": self.ml}


def predict_images(
    model: Model,
    trained: Trained,
    jobs: list[Job],
    output: Path,
    *,
    options: PredictionOptions = PredictionOptions(),
    segmentation: bool = True,
    resume: bool = False,
    observer: Observer = Observer(),
) -> Iterator[Outcome]:
    """Write a label map for each image, in the image's own grid, format and header geometry.

    The folder also gets ``labels.txt`` (names and colours for ITK-SNAP), ``predictions.jsonl`` (the ledger) and, at the
    end, ``volumes.csv`` (millilitres a class).

    Args:
        model: what predicts.
        trained: where it comes from.
        jobs: the images.
        output: folder of the label maps.
        options: what is done beyond predicting every slice once.
        segmentation: whether DICOM images get a DICOM segmentation, beside NIfTI.
        resume: leave out what the same adapter has segmented here in the same way.
        observer: is told of the progress.

    Yields:
        What became of every image: of those that are left out first, then in the order of ``jobs``. An image that cannot be
        read, or a label map that cannot be written, does not end the work.

    Raises:
        FlapsamError: nothing can be written to the output folder.
    """
    check_writable(output)
    write_text(output / DESCRIPTIONS, itk_snap(model.legend))
    ledger = Ledger(output / RECORD)
    method = _fingerprint(model, trained, options)
    done = _done(ledger, output, method) if resume else {}
    kept, left = [], []
    for job in jobs:
        event = done.get(job.stem.as_posix())
        if event and not job.fault and event.files == _files_of(job):
            kept.append(Outcome(job, tuple(output / name for name in event.written), event.ml))
        else:
            left.append(job)
    observer.begin("label maps", len(jobs), len(kept))
    try:
        yield from kept
        for outcome in _outcomes(model, left, output, options, segmentation, observer):
            yield outcome if outcome.error else _recorded(outcome, ledger, output, method)
    finally:
        try:
            _write_volumes(output, ledger, model.card.classes)
        except FlapsamError as error:
            observer.say(str(error))
        observer.end()


def _outcomes(
    model: Model, jobs: list[Job], output: Path, options: PredictionOptions, segmentation: bool, observer: Observer
) -> Iterator[Outcome]:
    """Read ahead, predict, write behind."""
    behind: Future[Outcome] | None = None
    with ThreadPoolExecutor(1) as writer, closing(ahead(_read(jobs), depth=1)) as volumes:
        for job, volume in volumes:
            found = volume
            if isinstance(volume, Volume):
                found = _tried(job, _segment, model, job, volume, options, observer)
            if behind is not None:
                yield behind.result()
            if isinstance(volume, Volume) and isinstance(found, Prediction):
                behind = writer.submit(_write, job, found, volume.affine, output, model.legend, segmentation)
            else:
                behind = None
                observer.step()
                yield Outcome(job, error=str(found))
            # The next one is there already; this one's voxels are not needed any more.
            del volume, found
        if behind is not None:
            yield behind.result()


def _read(jobs: Iterable[Job]) -> Iterator[tuple[Job, Volume | str]]:
    """Volumes, or why there is none."""
    for job in jobs:
        yield job, job.fault or _tried(job, read_image, job.image, *job.others)


def _segment(model: Model, job: Job, volume: Volume, options: PredictionOptions, observer: Observer) -> Prediction:
    try:
        return model.segment(volume, options, site=job.site, on_slices=lambda count, of: observer.step(count / of))
    except FlapsamError as error:
        raise FlapsamError(f"{job.image}: {error}") from error


def _write(
    job: Job, found: Prediction, affine: NDArray[np.float64], output: Path, legend: Legend, segmentation: bool
) -> Outcome:
    """All files of an image, or none."""
    written: list[Path] = []

    def write() -> None:
        written.extend(write_labels(found.labels, job.image, affine, output / job.stem, legend, segmentation=segmentation))
        if found.probabilities is not None:
            path = output / PROBABILITIES / job.stem.with_name(job.stem.name + ".nii.gz")
            write_probabilities(found.probabilities, job.image, affine, path)
            written.append(path)

    error = _tried(job, write)
    if error:
        return _withdrawn(Outcome(job, tuple(written)), error)
    # A slice at a time, because counting turns every voxel into eight bytes.
    slices = np.moveaxis(found.labels, 2, 0)
    voxels = np.sum([np.bincount(one.ravel(), minlength=len(legend) + 1) for one in slices], axis=0)
    ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    return Outcome(job, tuple(written), {segment.name: round(voxels[segment.value] * ml, 6) for segment in legend})


def _recorded(outcome: Outcome, ledger: Ledger, output: Path, method: str) -> Outcome:
    """The outcome, once it is in the ledger."""
    event = LabelMapWritten(
        case=outcome.job.stem.as_posix(),
        image=str(outcome.job.image),
        files=_files_of(outcome.job),
        method=method,
        written=[path.relative_to(output).as_posix() for path in outcome.written],
        ml=outcome.ml,
    )
    try:
        ledger.write(event)
    except OSError as error:
        return _withdrawn(outcome, f"{outcome.job.image}: {ledger.path} cannot be written ({error.strerror})")
    return outcome


def _withdrawn(outcome: Outcome, error: str) -> Outcome:
    """The failure of an image of which files were written already, and are taken away again."""
    for path in outcome.written:
        path.unlink(missing_ok=True)
    return Outcome(outcome.job, error=error)


def _tried(job: Job, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or a sentence on why it failed: hundreds of images must not be lost to one."""
    try:
        return function(*arguments)
    except FlapsamError as error:
        return str(error)
    except Exception as error:
        return f"{job.image}: unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"


def _fingerprint(model: Model, trained: Trained, options: PredictionOptions) -> str:
    """SHA-256 of all that label maps depend on but the images."""
    digest = hashlib.sha256(json.dumps([asdict(options), model.precision, __version__]).encode())
    for path in sorted(trained.folder.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _files_of(job: Job) -> list[list[Any]]:
    """Names, sizes and times of an image's files."""
    files = job.image.files if isinstance(job.image, Series) else (job.image, *job.others)
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.exists()]


def _newest(ledger: Ledger) -> dict[str, LabelMapWritten]:
    """Case → its newest label map."""
    return {event.case: event for event in ledger.events() if isinstance(event, LabelMapWritten)}


def _done(ledger: Ledger, output: Path, method: str) -> dict[str, LabelMapWritten]:
    """The newest label maps that were made by this method and whose files all exist."""
    return {
        case: event
        for case, event in _newest(ledger).items()
        if event.method == method and all((output / name).exists() for name in event.written)
    }


def _write_volumes(output: Path, ledger: Ledger, classes: Sequence[str]) -> None:
    """Write a row for every image that was ever segmented here."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["case", "image", "label_map", *(f"{name} (ml)" for name in classes)])
    for case, event in sorted(_newest(ledger).items()):
        rows.writerow([case, event.image, event.written[0], *(event.ml.get(name, "") for name in classes)])
    write_text(output / VOLUMES, table.getvalue())
