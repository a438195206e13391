"""Score label maps on disk against the ground truth on disk."""

from pathlib import Path

import numpy as np

from flapsam.adapters.store import read_card
from flapsam.adapters.trained import Trained, find_trained
from flapsam.base.errors import FlapsamError
from flapsam.base.names import spelling
from flapsam.learning.metrics import CaseScores, score_case
from flapsam.run.config import Data
from flapsam.run.observer import Observer
from flapsam.run.reading import validated
from flapsam.sites import Case, label_map
from flapsam.sites.pairs import check_geometry
from flapsam.volumes import case_name, is_image, read_label


def evaluate(
    predictions: Path, labels: Path, trained: Path | None = None, *, observer: Observer | None = None
) -> list[CaseScores]:
    """Score every label map in ``predictions`` against the ground truth of the same case in ``labels``.

    Args:
        predictions: folder with ``CASE.nii.gz`` or ``SITE/CASE.nii.gz``.
        labels: folder with the ground truth in the same layout, or a folder of sites (``SITE/labels/CASE.nii.gz``).
        trained: folder of the run or adapter that says which values in ``labels`` stand for which class. Without it, values
            are compared as they are, and each value above 0 is a class.
        observer: follows the cases.

    Returns:
        Scores of every case, ordered by site and name.

    Raises:
        FlapsamError: there is no label map to score, a label map has no ground truth, or the two do not match.
    """
    observer = observer or Observer()
    model = find_trained(trained) if trained else None
    predicted, truths = _label_maps(predictions), _label_maps(labels)
    if not predicted:
        raise FlapsamError(f"{predictions}: no label maps found; name them CASE.nii.gz or SITE/CASE.nii.gz")
    pairs = []
    for key, path in predicted.items():
        if key not in truths:
            raise FlapsamError(
                f"{path}: there is no label map for {'/'.join(key)} in {labels}; add it or remove the prediction"
            )
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
    """Paths of label maps by the names of their folders and case.

    A folder ``labels`` does not count as a name. The folders ``images`` and ``probabilities`` are left out.
    """
    if not folder.is_dir():
        raise FlapsamError(f"{folder}: no such folder")
    label_maps = {}
    for path in sorted(folder.rglob("*")):
        folders = path.relative_to(folder).parent.parts
        if is_image(path) and not {"images", "probabilities"} & set(folders):
            names = (*(part for part in folders if part != "labels"), case_name(path))
            label_maps[tuple(map(spelling, names))] = path
    return label_maps


def _data(trained: Trained | None, labels: Path) -> Data | None:
    if trained is None:
        return None
    if trained.run:
        return trained.run.data
    return validated({"path": labels, "labels": read_card(trained.folder).labels}, Data, str(trained.folder))


def _values(pairs: list[tuple[tuple[str, ...], Path, Path]], labels: Path) -> Data:
    """Labels in which every value above 0 is a class, named after the value."""
    values = {int(value) for _, *paths in pairs for path in paths for value in np.unique(read_label(path).array)} - {0}
    if not values:
        raise FlapsamError(f"{labels}: all label maps are empty, so there is nothing to score")
    return Data(path=labels, labels={str(value): value for value in sorted(values)})


def _as_classes(array: np.ndarray, data: Data) -> np.ndarray:
    """Convert label values to class indices. Each class has exactly one value."""
    return np.searchsorted([0, *(int(name) for name in data.classes)], array)
