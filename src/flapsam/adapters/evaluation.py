"""Label maps on disk against the truth on disk."""

from pathlib import Path

import numpy as np

from flapsam.adapters.store import read_card
from flapsam.adapters.trained import Trained, find_trained
from flapsam.base.errors import FlapsamError
from flapsam.learning.metrics import CaseScores, score_case
from flapsam.run.config import Data
from flapsam.run.observer import Observer
from flapsam.sites import Case, label_map
from flapsam.sites.pairs import check_geometry
from flapsam.volumes import case_name, is_image, read_label


def evaluate(
    predictions: Path, labels: Path, trained: Path | None = None, *, observer: Observer | None = None
) -> list[CaseScores]:
    """Score every label map in ``predictions`` against the truth of the same case in ``labels``.

    Args:
        predictions: folder with ``CASE.nii.gz`` or ``SITE/CASE.nii.gz``.
        labels: the same, or a folder of sites (``SITE/labels/CASE.nii.gz``).
        trained: folder of the run or adapter that says which values in ``labels`` stand for which class. Without it, values
            are compared as they are, and each value above 0 is a class.
        observer: follows the cases.

    Returns:
        Scores of every case, in the order of site and name.

    Raises:
        FlapsamError: there is nothing to score, a label map has no truth, or files do not fit each other.
    """
    observer = observer or Observer()
    model = find_trained(trained) if trained else None
    predicted, truths = _label_maps(predictions), _label_maps(labels)
    if not predicted:
        raise FlapsamError(f"{predictions}: no label map CASE.nii.gz or SITE/CASE.nii.gz there")
    pairs = []
    for key, path in predicted.items():
        if key not in truths:
            raise FlapsamError(f"{path}: there is no label map for {'/'.join(key)} in {labels}")
        pairs.append((key, path, truths[key]))
    data = _data(model, labels) or _values(pairs, labels)
    observer.begin("scores", len(pairs))
    scores = []
    for key, path, truth_path in pairs:
        *folders, name = key
        site = "/".join(folders)
        case = Case(name, site, name, path, truth_path)
        prediction, truth = read_label(path), read_label(truth_path)
        check_geometry(case, prediction.geometry, truth.geometry)
        mapping = label_map(data, site)
        scores.append(
            score_case(
                name,
                site,
                prediction.array if model else _as_classes(prediction.array, data),
                mapping.apply(truth.array, truth_path),
                truth.spacing,
                mapping.classes,
                mapping.annotated,
            )
        )
        observer.step()
    observer.end()
    return scores


def _label_maps(folder: Path) -> dict[tuple[str, ...], Path]:
    """Label maps by their place, where a folder ``labels`` does not count; ``images`` and ``probabilities`` are left out."""
    if not folder.is_dir():
        raise FlapsamError(f"{folder}: no such folder")
    found = {}
    for path in sorted(folder.rglob("*")):
        folders = path.relative_to(folder).parent.parts
        if is_image(path) and not {"images", "probabilities"} & set(folders):
            found[(*(part for part in folders if part != "labels"), case_name(path))] = path
    return found


def _data(trained: Trained | None, labels: Path) -> Data | None:
    if trained is None:
        return None
    return trained.run.data if trained.run else Data(path=labels, labels=read_card(trained.folder).labels)


def _values(pairs: list[tuple[tuple[str, ...], Path, Path]], labels: Path) -> Data:
    """Every value above 0 as a class of that name."""
    values = {int(value) for _, *paths in pairs for path in paths for value in np.unique(read_label(path).array)} - {0}
    if not values:
        raise FlapsamError(f"{labels}: all label maps are empty, there is nothing to score")
    return Data(path=labels, labels={str(value): value for value in sorted(values)})


def _as_classes(array: np.ndarray, data: Data) -> np.ndarray:
    """Values → class indices, where each class has one value."""
    return np.searchsorted([0, *(int(name) for name in data.classes)], array)
