"""Scores of one case: the agreement of a label map with the truth in 3-D, per class and region."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from flapsam.learning.metrics import measures
from flapsam.run.config import Absent, Evaluation
from flapsam.run.ledger import CaseTested, Cohort
from flapsam.sites import IGNORED

Values = dict[str, float | None]
"""Class or region → value."""
MISSED, SPURIOUS, ABSENT, BOTH = "missed", "spurious", "absent", "both"


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case, one value per class and region.

    None stands for a class that the site does not annotate, and, unless ``absent`` says otherwise, for a class that is in
    neither the truth nor the prediction. ``MEASURES`` says what each measure is.
    """

    case: str
    site: str
    dice: Values
    hd95: Values
    """95 % Hausdorff distance in mm. None also where distances were not computed, and in files of earlier versions where a
    label map lacks the class."""
    absent: Absent = "one"
    """Dice of a class that is in neither. Files of earlier versions do not say it, and hold 1."""
    missing: bool = False
    """Whether the case has no prediction, so that every class of its truth has the Dice 0."""
    surface_dice: Values = field(default_factory=dict)
    surface_distance: Values = field(default_factory=dict)
    """Mean surface distance in mm."""
    volume_error: Values = field(default_factory=dict)
    lesion_f1: Values = field(default_factory=dict)
    """Only for the classes and regions that are declared as lesions."""
    means: Values = field(default_factory=dict)
    """Name of a mean → mean Dice of its classes and regions, as far as they have one."""
    outcome: dict[str, str | None] = field(default_factory=dict)
    """Whether a structure is in ``both`` label maps, ``missed``, ``spurious`` or ``absent``; None if not annotated."""
    regions: Sequence[str] = ()
    """Names among these that are regions, which are not part of the mean over the classes."""
    subject: str = ""
    """The patient; the case itself if empty."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, without the regions."""
        return [name for name in self.dice if name not in self.regions]

    @property
    def patient(self) -> str:
        """Site and subject, which tell patients apart."""
        return f"{self.site}/{self.subject or self.case}"

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice over the classes that have one; None if none has."""
        return mean(self.dice[name] for name in self.classes)

    def values(self, measure: str) -> Values:
        """Class or region → value of a measure."""
        return getattr(self, measure)


def score_case(
    case: str,
    site: str,
    predicted: NDArray | None,
    truth: NDArray,
    spacing: Sequence[float] | None,
    classes: Sequence[str],
    annotated: Collection[int] | None = None,
    absent: Absent = "none",
    evaluation: Evaluation | None = None,
    subject: str = "",
) -> CaseScores:
    """Score predicted class indices against the truth, which has the same shape.

    Args:
        case: name of the case.
        site: name of its site.
        predicted: predicted class indices. None stands for a case without a prediction, in which every annotated class of
            the truth is missed, and a class that the truth lacks has no Dice under either rule.
        truth: true class indices. Voxels with −100 are left out, as if they were in neither; any other value counts as no
            class.
        spacing: voxel spacing in mm; without it, there are no measures of surfaces.
        classes: names of the classes 1, 2, …
        annotated: indices of the classes that the site annotates; all if None. A region needs all of its classes.
        absent: Dice and surface Dice of a class that is in neither ``predicted`` nor ``truth``: none, or one.
        evaluation: tolerances, regions, lesions and means; the defaults if None.
        subject: the patient; the case itself if empty.
    """
    evaluation = evaluation or Evaluation()
    missing = predicted is None
    predicted = np.zeros_like(truth) if predicted is None else predicted
    known = truth != IGNORED
    index_of = {name: index for index, name in enumerate(classes, start=1)}
    structures = {name: [name] for name in classes} | evaluation.regions
    scores: dict[str, dict[str, float | None]] = {name: {} for name in measures.MEASURES}
    outcome: dict[str, str | None] = {}
    for name, parts in structures.items():
        indices = [index_of[part] for part in parts]
        found: dict[str, float | None] = dict.fromkeys(scores)
        outcome[name] = None
        if annotated is None or set(indices) <= set(annotated):
            masks = np.isin(predicted, indices) & known, np.isin(truth, indices)
            outcome[name] = _outcome(*masks)
            found["dice"], found["volume_error"] = measures.dice(*masks), measures.volume_error(*masks)
            if spacing is not None:
                found |= _in_space(*masks, spacing, evaluation.tolerance_of(name))
            if name in evaluation.lesions:
                found["lesion_f1"] = measures.lesion_f1(*masks)
            if outcome[name] == ABSENT and absent == "one" and not missing:
                found |= dict.fromkeys(("dice", "surface_dice") if spacing is not None else ("dice",), 1.0)
        for measure, value in found.items():
            if measure != "lesion_f1" or name in evaluation.lesions:
                scores[measure][name] = value
    means = {name: mean(scores["dice"][part] for part in parts) for name, parts in evaluation.means.items()}
    return CaseScores(
        case=case,
        site=site,
        dice=scores["dice"],
        hd95=scores["hd95"],
        absent=absent,
        missing=missing,
        surface_dice=scores["surface_dice"],
        surface_distance=scores["surface_distance"],
        volume_error=scores["volume_error"],
        lesion_f1=scores["lesion_f1"],
        means=means,
        outcome=outcome,
        regions=list(evaluation.regions),
        subject=subject,
    )


def scores_of(event: CaseTested) -> CaseScores:
    """The scores of a tested case in a run's ledger."""
    tested = event.model_dump(include={one.name for one in fields(CaseScores)})
    return CaseScores(**tested)


def tested(cohort: Cohort, scores: CaseScores) -> CaseTested:
    """The entry of a tested case for a run's ledger.

    Args:
        cohort: whose adapter was tested.
        scores: the case's scores.
    """
    known = {one.name: getattr(scores, one.name) for one in fields(scores) if one.name in CaseTested.model_fields}
    return CaseTested(cohort=cohort, **known)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values, without None and NaN. None if no value remains."""
    present = [value for value in values if value is not None and not math.isnan(value)]
    return sum(present) / len(present) if present else None


def _outcome(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> str:
    return {(True, True): BOTH, (False, True): MISSED, (True, False): SPURIOUS, (False, False): ABSENT}[
        bool(predicted.any()), bool(truth.any())
    ]


def _in_space(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float], tolerance: float
) -> dict[str, float | None]:
    """Measure → value, for the measures of surfaces."""
    return {
        "surface_dice": measures.surface_dice(predicted, truth, spacing, tolerance),
        "hd95": measures.hd95(predicted, truth, spacing),
        "surface_distance": measures.surface_distance(predicted, truth, spacing),
    }
