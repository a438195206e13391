"""Checks of the numbers that a site reports beside its tensors. They go to the ledger, so none is taken on trust."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flapsam.federation.agreement import VALIDATION
from flapsam.learning.training import FIT_METRICS

MOST = 1e12
"""Largest loss, number of steps or number of seconds that a site may report."""
_STRICT = ConfigDict(strict=True)
Dice = Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float | None, Field(ge=0, le=MOST, allow_inf_nan=False)]
_SCORES = TypeAdapter(dict[str, Dice], config=_STRICT)
_AMOUNT = TypeAdapter(Amount, config=_STRICT)


def read_scores(scores: Any, classes: Collection[str] | None) -> dict[str, float | None]:
    """Check a site's validation scores.

    Args:
        scores: what the site sent. A site that keeps its metrics to itself sends an empty mapping.
        classes: the run's classes. None: any names are accepted.

    Raises:
        ValueError: they are not the Dice, between 0 and 1 or null, of every class and their mean.
    """
    try:
        valid = _SCORES.validate_python(scores)
    except ValidationError as error:
        raise ValueError("its scores are invalid: a Dice is a number between 0 and 1, or null") from error
    if valid and classes is not None and valid.keys() != {VALIDATION + name for name in ("mean", *classes)}:
        raise ValueError("its scores are invalid: they are not those of the run's classes and their mean")
    return valid


def check_metrics(metrics: Mapping[str, float | None], classes: Collection[str] | None) -> None:
    """Check the metrics in the header of a site's packet: validation scores, and the figures of its fit.

    Raises:
        ValueError: a metric is unknown or out of range.
    """
    read_scores({name: value for name, value in metrics.items() if name.startswith(VALIDATION)}, classes)
    for name, value in metrics.items():
        if name.startswith(VALIDATION):
            continue
        if name not in FIT_METRICS:
            raise ValueError("it reports a metric that was not asked for")
        if not is_amount(value):
            raise ValueError(f"its {name.replace('_', ' ')} is not a number between 0 and {MOST:g}")


def is_amount(value: Any) -> bool:
    """Whether a value that a site reported is None, or a number from 0 to ``MOST``."""
    try:
        _AMOUNT.validate_python(value)
    except ValidationError:
        return False
    return True
