"""Test a network, or several together, on a case: segment the whole volume and score the label map."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapsam.learning.inference import predict_ensemble, predict_volume
from flapsam.learning.metrics import CaseScores, score_case
from flapsam.run.config import RunConfig
from flapsam.sam import Sam
from flapsam.sites import Case, label_map
from flapsam.sites.pairs import read_pair


@dataclass(frozen=True)
class Tested:
    """A tested case."""

    labels: NDArray[np.uint8]
    """Predicted class indices on the image's own grid."""
    scores: CaseScores


def tested_case(network: Sam | Iterable[Sam], case: Case, config: RunConfig, *, ignores_unknown: bool = False) -> Tested:
    """Segment a case as ``flapsam predict`` does, and score it.

    Args:
        network: the fused network, or the networks of an ensemble.
        case: the case.
        config: the run's configuration.
        ignores_unknown: whether a label value that belongs to no class is left out of the scores, instead of an error.

    Raises:
        FlapsamError: the case cannot be read.
    """
    labels = replace(label_map(config.data, case.site), ignores_unknown=ignores_unknown)
    image, truth = read_pair(case, labels)
    how: Any = {"batch": config.inference_batch, "precision": config.precision, "site": case.site}
    if isinstance(network, Sam):
        predicted = predict_volume(network, image, config.samples, **how).labels
    else:
        predicted = predict_ensemble(network, image, config.samples, **how)
    scores = score_case(
        case.name,
        case.site,
        predicted,
        truth.array,
        image.spacing,
        labels.classes,
        labels.annotated,
        config.absent_class,
        config.evaluation,
        case.subject,
    )
    return Tested(predicted, scores)
