"""Scores of label maps: what is measured per case, and means over cases with their intervals."""

from flapsam.learning.metrics.case import CaseScores, mean, score_case, scores_of, tested
from flapsam.learning.metrics.interval import Mean, mean_of
from flapsam.learning.metrics.measures import MEASURES, Measure, dice, hd95
from flapsam.learning.metrics.summary import (
    Spread,
    Summary,
    as_json_of,
    by_site,
    crossed,
    few_patients,
    missing_cases,
    rule_for_absent,
    spread,
    spread_of,
    summarise,
)

__all__ = [
    "MEASURES",
    "CaseScores",
    "Mean",
    "Measure",
    "Spread",
    "Summary",
    "as_json_of",
    "by_site",
    "crossed",
    "dice",
    "few_patients",
    "hd95",
    "mean",
    "mean_of",
    "missing_cases",
    "rule_for_absent",
    "score_case",
    "scores_of",
    "spread",
    "spread_of",
    "summarise",
    "tested",
]
