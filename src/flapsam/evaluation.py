"""Label maps on disk against the truth on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flapsam.adapter import read_card
from flapsam.config import Data
from flapsam.errors import FlapsamError
from flapsam.metrics import CaseScores, score_case
from flapsam.sites import Case, label_map
from flapsam.slices import check_geometry
from flapsam.trained import Trained
from flapsam.volumes import case_name, is_image, read_label


def evaluate(
    predictions: Path, labels: Path, trained: Trained | None = None, *, on_case: Callable[[], None] = lambda: None
) -> list[CaseScores]:
    """Score every label map in ``predictions`` against the one of the same place in ``labels``.

    Args:
        predictions: ``CASE.nii.gz`` or ``SITE/CASE.nii.gz``.
        labels: the same, or a folder of sites (``SITE/labels/CASE.nii.gz``).
        trained: says which values in ``labels`` stand for which class; without it values are compared as they are, and each
            value above 0 is a class.
        on_case: called after every case.

    Raises:
        FlapsamError: nothing to score, a label map without its truth, or files that do not fit each other.
    """
    predicted, truths = _label_maps(predictions), _label_maps(labels)
    if not predicted:
        raise FlapsamError(f"{predictions}: no label map CASE.nii.gz or SITE/CASE.nii.gz there")
    pairs = []
    for key, path in predicted.items():
        if key not in truths:
            raise FlapsamError(f"{path}: there is no label map for {'/'.join(key)} in {labels}")
        pairs.append((key, path, truths[key]))
    data = _data(trained, labels) or _values(pairs, labels)
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
                prediction.array if trained else _as_classes(prediction.array, data),
                mapping.apply(truth.array, truth_path),
                truth.spacing,
                mapping.classes,
                mapping.annotated,
            )
        )
        on_case()
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
