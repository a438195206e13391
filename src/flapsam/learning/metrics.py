"""Agreement of a label map with the truth, per case and class, in 3-D."""

import math
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapsam.run.config import Absent
from flapsam.run.ledger import CaseTested, Event
from flapsam.sites import IGNORED


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case, one value per class.

    None stands for a class that the site does not annotate, and, unless ``absent`` says otherwise, for a class that is in
    neither the truth nor the prediction.
    """

    case: str
    site: str
    dice: dict[str, float | None]
    hd95: dict[str, float | None]
    """95 % Hausdorff distance in mm. None also where a label map lacks the class or distances were not computed."""
    absent: Absent = "one"
    """Dice of a class that is in neither. Files of earlier versions do not say it, and hold 1."""
    missing: bool = False
    """Whether the case has no prediction, so that every class of its truth has the Dice 0."""


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float | None:
    """Dice coefficient 2·|P ∩ T| / (|P| + |T|). It is 0 if only one mask is empty, and None if both are."""
    both = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth))
    return None if both == 0 else 2 * int(np.count_nonzero(predicted & truth)) / both


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
    absent: Absent = "none",
) -> CaseScores:
    """Score predicted class indices against the truth, which has the same shape.

    Args:
        case: name of the case.
        site: name of its site.
        predicted: predicted class indices.
        truth: true class indices. Voxels with −100 are left out, as if they were in neither; any other value counts as no
            class.
        spacing: voxel spacing in mm; without it, distances are not computed.
        classes: names of the classes 1, 2, …
        annotated: indices of the classes that the site annotates; all if None.
        absent: Dice of a class that is in neither ``predicted`` nor ``truth``: none, or one.
    """
    known = truth != IGNORED
    dices: dict[str, float | None] = {}
    distances: dict[str, float | None] = {}
    for index, name in enumerate(classes, start=1):
        if annotated is not None and index not in annotated:
            dices[name] = distances[name] = None
            continue
        masks = (predicted == index) & known, truth == index
        value = dice(*masks)
        dices[name] = 1.0 if value is None and absent == "one" else value
        distances[name] = None if spacing is None else hd95(*masks, spacing)
    return CaseScores(case, site, dices, distances, absent)


def score_missing(
    case: str,
    site: str,
    truth: NDArray,
    classes: Sequence[str],
    annotated: Collection[int] | None = None,
    absent: Absent = "none",
) -> CaseScores:
    """Scores of a case that has no prediction: 0 for every annotated class of its truth, and none for the others.

    Args:
        case: name of the case.
        site: name of its site.
        truth: true class indices, as for ``score_case``.
        classes: names of the classes 1, 2, …
        annotated: indices of the classes that the site annotates; all if None.
        absent: the rule for absent classes in other cases' scores. No class gets a 1 here.
    """
    zeros = score_case(case, site, np.zeros_like(truth), truth, None, classes, annotated)
    return replace(zeros, absent=absent, missing=True)


def scores_of(event: CaseTested) -> CaseScores:
    """The scores of a tested case in a run's ledger."""
    return CaseScores(event.case, event.site, event.dice, event.hd95, event.absent)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values, without None and NaN. None if no value remains."""
    present = _present(values)
    return sum(present) / len(present) if present else None


@dataclass(frozen=True)
class Summary:
    """Mean scores over cases, per class and over the classes."""

    cases: int
    dice: dict[str, float | None]
    hd95: dict[str, float | None]
    mean_dice: float | None
    """Mean of the classes' means."""
    dice_cases: dict[str, int]
    """Number of cases that each class's mean Dice is over."""
    hd95_cases: dict[str, int]
    """Number of cases that each class's mean distance is over."""
    mean_dice_cases: int
    """Number of cases that ``mean_dice`` is over, which are those with a Dice for at least one class."""


def summarise(scores: Sequence[CaseScores]) -> Summary:
    """Average Dice and distance over the cases for each class, and Dice over the classes."""
    classes = list(scores[0].dice) if scores else []
    dices = {name: _present(score.dice[name] for score in scores) for name in classes}
    distances = {name: _present(score.hd95[name] for score in scores) for name in classes}
    per_class = {name: mean(values) for name, values in dices.items()}
    return Summary(
        cases=len(scores),
        dice=per_class,
        hd95={name: mean(values) for name, values in distances.items()},
        mean_dice=mean(per_class.values()),
        dice_cases={name: len(values) for name, values in dices.items()},
        hd95_cases={name: len(values) for name, values in distances.items()},
        mean_dice_cases=sum(bool(_present(score.dice.values())) for score in scores),
    )


def rule_for_absent(scores: Iterable[CaseScores]) -> str:
    """A sentence that names the Dice of classes that are in neither the truth nor the prediction of a case."""
    rules = {score.absent for score in scores}
    if rules == {"one"}:
        return "A class that is in neither the truth nor the prediction of a case has the Dice 1 there."
    if rules <= {"none"}:
        return "A class that is in neither the truth nor the prediction of a case has no Dice there, and means leave it out."
    return (
        "Where a class is in neither the truth nor the prediction, some cases have the Dice 1, as in earlier versions, and "
        "others have none."
    )


def missing_cases(scores: Iterable[CaseScores]) -> list[str]:
    """Names of the cases without a prediction, as ``SITE/CASE`` or ``CASE``."""
    return ["/".join(filter(None, (score.site, score.case))) for score in scores if score.missing]


def by_site(scores: Iterable[CaseScores]) -> dict[str, list[CaseScores]]:
    """Group scores by site, in the order of the sites' names."""
    sites: dict[str, list[CaseScores]] = {}
    for score in scores:
        sites.setdefault(score.site, []).append(score)
    return dict(sorted(sites.items()))


def crossed(events: Iterable[Event]) -> dict[str, dict[str, float | None]]:
    """The shared adapter and those that sites keep for their own use → site → mean Dice on its test cases.

    Empty if no site keeps an adapter of its own.

    Args:
        events: the ledger of a run.
    """
    tested: dict[str, list[CaseScores]] = {}
    for event in events:
        if isinstance(event, CaseTested) and event.cohort.mode in ("federated", "personal"):
            tested.setdefault(str(event.cohort), []).append(scores_of(event))
    dices = {
        adapter: {site: summarise(part).mean_dice for site, part in by_site(scores).items()}
        for adapter, scores in tested.items()
    }
    return dices if len(dices) > 1 else {}


def as_json_of(scores: Sequence[CaseScores]) -> dict[str, Any]:
    """Scores as JSON for other programs: means over all cases, means by site, and every case."""
    sites = {site: asdict(summarise(part)) for site, part in by_site(scores).items()}
    return {
        "pooled": asdict(summarise(scores)),
        "sites": sites,
        "cases": [asdict(case) for case in scores],
        "absent": rule_for_absent(scores),
        "missing": missing_cases(scores),
    }


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Slices of the smallest box that holds all true voxels, with a margin of one voxel."""
    box = []
    for axis in range(mask.ndim):
        line = np.flatnonzero(mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis)))
        box.append(slice(max(int(line[0]) - 1, 0), int(line[-1]) + 2))
    return tuple(box)
