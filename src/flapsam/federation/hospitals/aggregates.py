"""Test scores of a site as they may leave it: figures over many patients."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats.mstats import hdquantiles

from flapsam.federation.shares import rounded
from flapsam.learning.metrics import MEASURES, CaseScores, Mean, mean_of, summarise
from flapsam.run.site_scores import Differences, Figures, SiteScores

QUARTERS = 4
"""Quartiles are told only if each quarter of the patients is as large as the least group."""


@dataclass(frozen=True)
class Discretion:
    """What may be told about a group of patients."""

    least: int
    """Number of patients below which nothing is told."""

    def figures(
        self, mean: Mean | None, values: Mapping[str, float], patients: Mapping[str, str], digits: int
    ) -> Figures | None:
        """Figures of a measure; None if too few patients stand behind it.

        Args:
            mean: the mean over the cases.
            values: case → value.
            patients: case → patient.
            digits: number of digits after the decimal point that are told.
        """
        if mean is None or mean.patients < self.least:
            return None
        own = np.array(list(_by_patient(values, patients).values()))
        quartiles = None
        if len(own) >= QUARTERS * self.least:
            # An ordinary quartile is the value of one patient, or lies between those of two.
            first, median, third = (round(float(value), digits) for value in hdquantiles(own, (0.25, 0.5, 0.75)))
            quartiles = first, median, third
        deviation = float(own.std(ddof=1)) if len(own) > 1 else 0.0
        return Figures(
            patients=rounded(len(own)),
            mean=round(mean.value, digits),
            low=_rounded(mean.low, digits),
            high=_rounded(mean.high, digits),
            deviation=round(deviation, digits),
            quartiles=quartiles,
        )

    def count(self, number: int, whole: int) -> int | None:
        """A number of cases among all of a site's; None if it, or what is left of them, is small but not 0."""
        small = 0 < number < self.least or 0 < whole - number < self.least
        return None if small else number


def aggregated(scores: Sequence[CaseScores], least: int, before: Sequence[CaseScores] = ()) -> SiteScores | None:
    """Aggregate a site's test scores; None if the site has too few test patients.

    Args:
        scores: the scores of all test cases.
        least: number of patients below which nothing is told.
        before: scores of another adapter on the same cases, whose mean Dice is subtracted.
    """
    tell, summary = Discretion(least), summarise(scores)
    if summary.patients < least:
        return None
    patients = {str(place): score.patient for place, score in enumerate(scores)}

    def over(measure: str, name: str) -> dict[str, float]:
        values = ((str(place), score.values(measure).get(name)) for place, score in enumerate(scores))
        return {place: value for place, value in values if value is not None}

    measures: dict[str, dict[str, Figures]] = defaultdict(dict)
    for measure, means in summary.measures.items():
        for name, mean in means.items():
            if figures := tell.figures(mean, over(measure, name), patients, MEASURES[measure].digits):
                measures[measure][name] = figures
    dices = {str(place): value for place, score in enumerate(scores) if (value := score.mean_dice) is not None}
    digits = MEASURES["dice"].digits
    means = {name: tell.figures(mean, over("means", name), patients, digits) for name, mean in summary.means.items()}
    told = measures.get("dice", {})
    return SiteScores(
        cases=rounded(len(scores)),
        patients=rounded(summary.patients),
        measures=dict(measures),
        mean=tell.figures(summary.mean, dices, patients, digits),
        means={name: figures for name, figures in means.items() if figures},
        missed={name: tell.count(summary.missed[name], summary.outcomes[name]) for name in told},
        spurious={name: tell.count(summary.spurious[name], summary.outcomes[name]) for name in told},
        difference=_difference(scores, before, least) if before else None,
    )


def _difference(scores: Sequence[CaseScores], before: Sequence[CaseScores], least: int) -> Differences | None:
    """Mean difference of the cases' mean Dice, with its interval over patients."""
    earlier = {score.case: score.mean_dice for score in before}
    values, patients = {}, {}
    for score in scores:
        one, other = score.mean_dice, earlier.get(score.case)
        if one is not None and other is not None:
            values[score.case], patients[score.case] = one - other, score.patient
    mean = mean_of([values], patients, lowest=-1.0) if values else None
    if mean is None or mean.patients < least:
        return None
    low, high = (_rounded(end, 3) for end in (mean.low, mean.high))
    return Differences(patients=rounded(mean.patients), mean=round(mean.value, 3), low=low, high=high)


def pooled_dice(sites: Mapping[str, Figures | None]) -> Mean | None:
    """The mean Dice over all sites' patients, from the sites' own means; None if no site has told any.

    Args:
        sites: site → its figures. Each counts by its number of patients. The interval is for patients of these sites.
    """
    known = [figures for figures in sites.values() if figures and figures.patients]
    total = sum(figures.patients for figures in known)
    if not total:
        return None
    mean = sum(figures.patients * figures.mean for figures in known) / total
    error = math.sqrt(sum(figures.patients * figures.deviation**2 for figures in known)) / total
    return Mean(mean, max(0.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error), total, total)


def _by_patient(values: Mapping[str, float], patients: Mapping[str, str]) -> dict[str, float]:
    """Patient → mean over the patient's cases."""
    own: dict[str, list[float]] = defaultdict(list)
    for case, value in values.items():
        own[patients[case]].append(value)
    return {patient: math.fsum(found) / len(found) for patient, found in own.items()}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
