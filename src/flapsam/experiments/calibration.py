"""Calibrate an adapter's confidence on labelled cases: which Dice follows from its probabilities, and what it knows."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from flapsam.adapters.confidence import Confidence, checksum_of, look_of
from flapsam.adapters.model import Model, load
from flapsam.adapters.trained import Trained, find_trained
from flapsam.base.device import set_up_torch
from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError
from flapsam.base.files import check_writable
from flapsam.experiments.simulation import divided
from flapsam.learning import confidence, familiarity
from flapsam.learning.confidence import Line, Reliability
from flapsam.learning.familiarity import Familiar, Look
from flapsam.learning.inference import PredictionOptions
from flapsam.learning.metrics import score_case
from flapsam.run.config import Checkpoint, Data
from flapsam.run.observer import Observer
from flapsam.run.reading import validated
from flapsam.sites import Case, label_map, read_sites
from flapsam.sites.pairs import read_pair
from flapsam.volumes import read_image

LABELS = {"labels", "site_labels"}
"""Fields of a run's data that say what label values stand for."""


@dataclass(frozen=True)
class Calibration:
    """Outcome of a calibration."""

    line: Line
    points: dict[str, tuple[float, float]]
    """``SITE/PATIENT`` → expected and measured Dice, the means over classes and cases."""
    rank_correlation: float | None
    """Spearman's correlation between them; None where one of them is constant."""
    brier: float | None
    calibration_error: float | None
    reliability: Sequence[tuple[float, float, int]]
    """Mean probability, share that is right and number of voxels of each range of probabilities."""
    images: int
    """Number of images that say what is usual."""
    components: int
    """Number of principal components of their slices."""

    def as_json(self) -> dict[str, Any]:
        """The calibration for other programs."""
        return asdict(self)


def calibrate(
    path: Path,
    output: Path,
    data: Path | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    options: PredictionOptions = PredictionOptions(),
    device: str = "cpu",
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto",
    threads: int | None = None,
    observer: Observer | None = None,
) -> Calibration:
    """Calibrate an adapter and write the file that ``flapsam predict --confidence`` takes.

    An adapter of a run is calibrated on the run's validation cases, and knows the images of its training and validation
    cases. With ``data``, which any other adapter needs, all cases there serve for both.

    Args:
        path: the folder of a run or of an adapter.
        output: the file to write.
        data: folder of labelled cases that the adapter was not trained on.
        checkpoint: the backbone's checkpoint, if the adapter needs one.
        options: the options that ``flapsam predict`` will be used with.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        precision: precision of the image encoder, as in ``flapsam predict``.
        threads: number of threads; all cores if None.
        observer: follows the cases.

    Raises:
        FlapsamError: there is no adapter, its data cannot be read, they are too few, or the file cannot be written.
    """
    observer = observer or Observer()
    if output.is_dir():
        raise FlapsamError(f"{output}: this is a folder; name the file to write")
    check_writable(output.parent)
    trained = find_trained(path)
    set_up_torch(threads or default_threads(), deterministic=True)
    model = load(path, checkpoint=checkpoint, device=device, precision=precision)
    labels, scored, known = _cases(path, trained, data, model)
    patients, images = set(map(_patient, scored)), len(known) + len(scored)
    if len(patients) < confidence.FEWEST or images < familiarity.FEWEST:
        raise FlapsamError(
            f"{path}: there are {len(patients)} patients to calibrate on and {images} images; a calibration needs at "
            f"least {confidence.FEWEST} patients and {familiarity.FEWEST} images. Name more cases with --data"
        )
    looks: list[Look] = []
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    reliability = Reliability()
    observer.begin("calibration", images)
    for case in known:
        looks.append(look_of(model, read_image(*case.images), case.site, _patient(case)))
        observer.step()
    for case in scored:
        looks.append(_score(model, case, labels, options, found, reliability))
        observer.step()
    observer.end()
    points = {patient: (_mean(pairs, 0), _mean(pairs, 1)) for patient, pairs in sorted(found.items())}
    if len(points) < confidence.FEWEST:
        raise FlapsamError(
            f"{path}: only {len(points)} patients have a class in truth or prediction; a calibration needs at least "
            f"{confidence.FEWEST}. Name more cases with --data"
        )
    expected, measured = zip(*points.values(), strict=True)
    line = Line.through(expected, measured)
    familiar = Familiar.of(looks)
    Confidence(checksum_of(trained.folder), line, familiar, options).write(output)
    constant = len(set(expected)) == 1 or len(set(measured)) == 1
    return Calibration(
        line,
        points,
        None if constant else rank_correlation(expected, measured),
        reliability.brier,
        reliability.error,
        reliability.table(),
        len(looks),
        len(familiar.basis),
    )


def _cases(path: Path, trained: Trained, data: Path | None, model: Model) -> tuple[Data, list[Case], list[Case]]:
    """The labels, the cases that are scored, and those whose images are known."""
    if trained.run is not None and data is None:
        config = trained.run
        sites = divided(config, read_sites(config.data, config.seed))
        training = [site for site in sites if site.name not in config.data.unseen]
        scored = [case for site in training for case in site.of("val")]
        return config.data, scored, [case for site in training for case in site.of("train")]
    if data is None:
        raise FlapsamError(f"{path}: this adapter lies in no run; name a folder of labelled cases with --data")
    known = {"labels": model.card.labels} if trained.run is None else trained.run.data.model_dump(include=LABELS)
    labels = validated({**known, "path": data}, Data, str(data))
    cases = [case for site in read_sites(labels, 0) for case in site.cases]
    return labels, cases, []


def _patient(case: Case) -> str:
    return f"{case.site}/{case.subject}"


def _score(
    model: Model,
    case: Case,
    data: Data,
    options: PredictionOptions,
    found: dict[str, list[tuple[float, float]]],
    reliability: Reliability,
) -> Look:
    """Segment a case, add its expected and measured Dice to those of its patient, and return its look."""
    labels = label_map(data, case.site)
    image, truth = read_pair(case, labels)
    prediction = model.segment(image, replace(options, probabilities=True, confidence=True), site=case.site)
    assert prediction.probabilities is not None
    scores = score_case(case.name, case.site, prediction.labels, truth.array, None, labels.classes, labels.annotated)
    # Over the same classes, of which a site may annotate only some.
    pairs = zip(prediction.expected, (scores.dice[name] for name in labels.classes), strict=True)
    known = [(expected, dice) for expected, dice in pairs if expected is not None and dice is not None]
    if known:
        found[_patient(case)].append((_mean(known, 0), _mean(known, 1)))
    # Where not all classes are annotated, only voxels of classes are known, and the truth would decide what counts.
    if len(labels.annotated) == len(labels.classes):
        reliability.add(prediction.probabilities, truth.array)
    return look_of(model, image, case.site, _patient(case))


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's correlation, which is Pearson's of the ranks."""
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _mean(pairs: Sequence[tuple[float, float]], which: int) -> float:
    return sum(pair[which] for pair in pairs) / len(pairs)
