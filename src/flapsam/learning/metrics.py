"""Agreement of a label map with the truth, per case and class, in 3-D."""

import math
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapsam.run.ledger import CaseTested


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case, one value per class. None stands for a class that the site does not annotate."""

    case: str
    site: str
    dice: dict[str, float | None]
    hd95: dict[str, float | None]
    """95 % Hausdorff distance in mm. None also where a label map lacks the class or distances were not computed."""


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice coefficient 2·|P ∩ T| / (|P| + |T|). It is 1 if both masks are empty, and 0 if only one is."""
    both = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth))
    return 1.0 if both == 0 else 2 * int(np.count_nonzero(predicted & truth)) / both


def hd95(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float]) -> float | None:
    """95 % Hausdorff distance in mm, the larger of the two directions (MONAI). None if either mask is empty."""
    if not predicted.any() or not truth.any():
        return None
    # torch and MONAI take seconds to import, and most commands and a federation's processes do not need them.
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    box = _box(predicted | truth)
    pair = [torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None].float() for mask in (predicted, truth)]
    with warnings.catch_warnings():
        # MONAI warns about an argument that it passes itself.
        warnings.simplefilter("ignore", FutureWarning)
        distance = compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=[float(s) for s in spacing]
        )
    return float(distance)


def score_case(
    case: str,
    site: str,
    predicted: NDArray,
    truth: NDArray,
    spacing: Sequence[float] | None,
    classes: Sequence[str],
    annotated: Collection[int] | None = None,
) -> CaseScores:
    """Score predicted class indices against the truth, which has the same shape.

    Args:
        case: name of the case.
        site: name of its site.
        predicted: predicted class indices.
        truth: true class indices; any other value counts as no class.
        spacing: voxel spacing in mm; without it, distances are not computed.
        classes: names of the classes 1, 2, …
        annotated: indices of the classes that the site annotates; all if None.
    """
    dices: dict[str, float | None] = {}
    distances: dict[str, float | None] = {}
    for index, name in enumerate(classes, start=1):
        if annotated is not None and index not in annotated:
            dices[name] = distances[name] = None
            continue
        masks = predicted == index, truth == index
        dices[name] = dice(*masks)
        distances[name] = None if spacing is None else hd95(*masks, spacing)
    return CaseScores(case, site, dices, distances)


def scores_of(event: CaseTested) -> CaseScores:
    """The scores of a tested case in a run's ledger."""
    return CaseScores(event.case, event.site, event.dice, event.hd95)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values, without None and NaN. None if no value remains."""
    present = [value for value in values if value is not None and not math.isnan(value)]
    return sum(present) / len(present) if present else None


@dataclass(frozen=True)
class Summary:
    """Mean scores over cases, per class and over the classes."""

    cases: int
    dice: dict[str, float | None]
    hd95: dict[str, float | None]
    mean_dice: float | None


def summarise(scores: Sequence[CaseScores]) -> Summary:
    """Average Dice and distance over the cases for each class, and Dice over the classes."""
    classes = list(scores[0].dice) if scores else []
    per_class = {name: mean(score.dice[name] for score in scores) for name in classes}
    distances = {name: mean(score.hd95[name] for score in scores) for name in classes}
    return Summary(len(scores), per_class, distances, mean(per_class.values()))


def by_site(scores: Iterable[CaseScores]) -> dict[str, list[CaseScores]]:
    """Group scores by site, in the order of the sites' names."""
    sites: dict[str, list[CaseScores]] = {}
    for score in scores:
        sites.setdefault(score.site, []).append(score)
    return dict(sorted(sites.items()))


def as_json_of(scores: Sequence[CaseScores]) -> dict[str, Any]:
    """Scores as JSON for other programs: means over all cases, means by site, and every case."""
    sites = {site: asdict(summarise(part)) for site, part in by_site(scores).items()}
    return {"pooled": asdict(summarise(scores)), "sites": sites, "cases": [asdict(case) for case in scores]}


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Slices of the smallest box that holds all true voxels, with a margin of one voxel."""
    box = []
    for axis in range(mask.ndim):
        line = np.flatnonzero(mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis)))
        box.append(slice(max(int(line[0]) - 1, 0), int(line[-1]) + 2))
    return tuple(box)
