"""Score label maps on disk against the ground truth on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flapsam.adapters.store import read_card
from flapsam.adapters.trained import Trained, find_trained
from flapsam.base.errors import FlapsamError
from flapsam.base.names import spelling
from flapsam.learning.metrics import CaseScores, score_case
from flapsam.run.config import Absent, Data, Evaluation
from flapsam.run.folder import RunFolder
from flapsam.run.observer import Observer
from flapsam.run.reading import read_config, validated
from flapsam.sites import IGNORED, Case, LabelMap, label_map, list_cases, read_sites
from flapsam.sites.pairs import on_grid
from flapsam.volumes import case_name, is_image, read_label

Key = tuple[str, ...]
"""Names of the folders and of the case."""
Missing = Literal["error", "zero", "leave-out"]
"""What becomes of a case that has a ground truth and no prediction."""


def evaluate(
    predictions: Path,
    labels: Path,
    trained: Path | None = None,
    *,
    missing: Missing = "error",
    absent: Absent | None = None,
    evaluation: Evaluation | None = None,
    observer: Observer | None = None,
) -> list[CaseScores]:
    """Score every label map in ``predictions`` against the ground truth of the same case in ``labels``.

    Voxels that the ground truth ignores are left out.

    Args:
        predictions: folder with ``CASE.nii.gz`` or ``SITE/CASE.nii.gz``.
        labels: folder with the ground truth in the same layout, or a folder of sites (``SITE/labels/CASE.nii.gz``). Where
            the cases have splits, those of the splits with a prediction must have one, else all cases.
        trained: folder of the run or adapter that says which values in ``labels`` stand for which class. Without it, values
            are compared as they are, and each value above 0 is a class.
        missing: whether a ground truth without a prediction is an error, has the Dice 0 for each of its classes, or is left
            out.
        absent: Dice of a class that is in neither label map: ``none``, so that means leave the case out, or ``one``. By
            default that of the run, or ``none``.
        evaluation: tolerances, regions, lesions and means. By default those of the run.
        observer: follows the cases.

    Returns:
        Scores of every case, ordered by site and name.

    Raises:
        FlapsamError: there is no label map to score, a label map has no ground truth, a prediction is missing, or the two
            do not match.
    """
    observer = observer or Observer()
    model = find_trained(trained) if trained else None
    absent = absent or (model.run.absent_class if model and model.run else "none")
    predicted, truths = _label_maps(predictions), _label_maps(labels)
    if not predicted:
        raise FlapsamError(f"{predictions}: no label maps found; name them CASE.nii.gz or SITE/CASE.nii.gz")
    for key, path in predicted.items():
        if key not in truths:
            raise FlapsamError(
                f"{path}: there is no label map for {'/'.join(key)} in {labels}; add it or remove the prediction"
            )
    cases = _cases(predictions, labels, model)
    unpredicted = _unpredicted(predicted, truths, cases)
    names = ", ".join("/".join(key) for key in unpredicted)
    if unpredicted and missing == "error":
        count = f"{len(unpredicted)} of {len(predicted) + len(unpredicted)} cases"
        raise FlapsamError(
            f"{predictions}: no prediction for {count}: {names}; add them, or choose --missing zero or --missing leave-out"
        )
    if unpredicted and missing == "leave-out":
        observer.say(f"left out, because there is no prediction: {names}")
        unpredicted = []
    keys = sorted([*predicted, *unpredicted])
    data = _data(model, labels) or _values([*predicted.values(), *(truths[key] for key in keys)], labels)
    evaluation = evaluation or (model.run.evaluation if model and model.run else Evaluation())
    try:
        evaluation.check(data.classes)
    except ValueError as error:
        raise FlapsamError(str(error)) from error
    observer.begin("scores", len(keys))
    scores = []
    for key in keys:
        mapping = label_map(data, "/".join(key[:-1]))
        case = cases.get(truths[key].resolve())
        score = _score(key, predicted.get(key), truths[key], mapping, absent, evaluation, indices=model is not None)
        scores.append(replace(score, subject=case.subject if case else ""))
        observer.step()
    observer.end()
    return scores


def evaluation_of(
    trained: Path | None, tolerance: float | None = None, regions: Sequence[str] = (), lesions: Sequence[str] = ()
) -> Evaluation:
    """The evaluation of an adapter's run, or the default one, with some values replaced.

    Args:
        trained: folder of the run or adapter.
        tolerance: largest distance in mm between surfaces that counts as agreement; unchanged if None.
        regions: further regions as ``NAME=CLASS,CLASS``.
        lesions: further classes and regions with separate parts.

    Raises:
        FlapsamError: a region is not of this form, or there is no such adapter.
    """
    model = find_trained(trained) if trained else None
    known = model.run.evaluation if model and model.run else Evaluation()
    tree: dict[str, object] = known.model_dump()
    if tolerance is not None:
        tree["tolerance"] = tolerance
    if regions:
        pairs = [region.partition("=") for region in regions]
        for region, (name, sign, parts) in zip(regions, pairs, strict=True):
            if not (name and sign and parts):
                raise FlapsamError(f"--region {region}: write NAME=CLASS,CLASS, such as kidney_and_tumour=kidney,tumour")
        tree["regions"] = {**known.regions, **{name: parts.split(",") for name, _, parts in pairs}}
    if lesions:
        tree["lesions"] = [*dict.fromkeys([*known.lesions, *lesions])]
    return validated(tree, Evaluation, "the evaluation")


def _score(
    key: Key,
    path: Path | None,
    truth_path: Path,
    mapping: LabelMap,
    absent: Absent,
    evaluation: Evaluation,
    *,
    indices: bool,
) -> CaseScores:
    """Score one case. Without a prediction, its classes have the Dice 0."""
    *folders, name = key
    site = "/".join(folders)
    truth = read_label(truth_path)
    classes = mapping.apply(truth.array, truth_path)
    prediction = on_grid(read_label(path), str(path), "the ground truth", truth.geometry).array if path else None
    if path and prediction is not None:
        if indices:
            _check_indices(prediction, classes, mapping, path)
        else:
            prediction = mapping.apply(prediction, path)
    return score_case(name, site, prediction, classes, truth.spacing, mapping.classes, mapping.annotated, absent, evaluation)


def _check_indices(prediction: NDArray, truth: NDArray, mapping: LabelMap, path: Path) -> None:
    """Check that a prediction holds 0, 1, 2, … in the order of the classes wherever it is scored."""
    wrong = ((prediction < 0) | (prediction > len(mapping.classes))) & (truth != IGNORED)
    if wrong.any():
        values = ", ".join(str(value) for value in np.unique(prediction[wrong])[:5])
        names = ", ".join(f"{index} ({name})" for index, name in enumerate(mapping.classes, start=1))
        raise FlapsamError(f"{path}: value {values} belongs to no class; a prediction holds 0 (background), {names}")


def _label_maps(folder: Path) -> dict[Key, Path]:
    """Paths of label maps by the names of their folders and case.

    A folder ``labels`` does not count as a name. The folders ``images``, ``probabilities`` and ``uncertainty`` are left out.
    """
    if not folder.is_dir():
        raise FlapsamError(f"{folder}: no such folder")
    label_maps: dict[Key, Path] = {}
    for path in sorted(folder.rglob("*")):
        folders = path.relative_to(folder).parent.parts
        if is_image(path) and not {"images", "probabilities", "uncertainty"} & set(folders):
            names = (*(part for part in folders if part != "labels"), case_name(path))
            key = tuple(map(spelling, names))
            if key in label_maps:
                raise FlapsamError(f"{path}: {label_maps[key].name} is a label map of the same case; remove one of the two")
            label_maps[key] = path
    return label_maps


def _cases(predictions: Path, labels: Path, trained: Trained | None) -> dict[Path, Case]:
    """Label map → its case, which has a subject and a split, as far as they are known.

    Splits are those of the run with the adapter, those of the run whose own predictions are scored, or those that the data
    have themselves.
    """
    run = trained.run if trained else None
    own = RunFolder(predictions.resolve().parent.parent).config
    if run is None and own.exists():
        run = read_config(own)
    try:
        if run is None:
            cases = list_cases(labels).cases
        else:
            data = run.data.model_copy(update={"path": labels})
            cases = [case for site in read_sites(data, run.seed) for case in site.cases]
    except FlapsamError:
        # A folder of label maps alone has no splits.
        return {}
    return {case.label.resolve(): case for case in cases}


def _unpredicted(predicted: Mapping[Key, Path], truths: Mapping[Key, Path], cases: Mapping[Path, Case]) -> list[Key]:
    """Cases without a prediction, of those splits that have any prediction."""
    split_of = {key: case.split if (case := cases.get(path.resolve())) else None for key, path in truths.items()}
    scored = {split_of[key] for key in predicted}
    return [key for key in truths if key not in predicted and split_of[key] in scored]


def _data(trained: Trained | None, labels: Path) -> Data | None:
    """The labels of the run or of the adapter, whose predictions hold the indices of its classes."""
    if trained is None:
        return None
    card = read_card(trained.folder)
    data = trained.run.data if trained.run else validated({"path": labels, "labels": card.labels}, Data, str(trained.folder))
    if data.classes != card.classes:
        raise FlapsamError(
            f"{trained.folder}: the adapter's classes are {', '.join(card.classes)}, but those of its labels are "
            f"{', '.join(data.classes)}; train it again, because a value 0, background or ignore is no class"
        )
    return data


def _values(paths: list[Path], labels: Path) -> Data:
    """Labels in which every value above 0 is a class, named after the value."""
    values = {int(value) for path in paths for value in np.unique(read_label(path).array)} - {0}
    if not values:
        raise FlapsamError(f"{labels}: all label maps are empty, so there is nothing to score")
    if min(values) < 0:
        raise FlapsamError(f"{labels}: label value {min(values)} is below 0; say with --adapter what it stands for")
    return Data(path=labels, labels={str(value): value for value in sorted(values)})
