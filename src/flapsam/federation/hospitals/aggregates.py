"""Test scores of a site as they may leave it: summary figures over its patients."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

import numpy as np
from scipy.stats.mstats import hdquantiles

from flapsam.federation.shares import rounded
from flapsam.learning.metrics import MEASURES, CaseScores, Mean, mean_of, summarise
from flapsam.learning.metrics.case import ABSENT, BOTH, MISSED, SPURIOUS
from flapsam.learning.metrics.interval import t_interval
from flapsam.run.config import Evaluation
from flapsam.run.site_scores import Differences, Figures, SiteScores

MOST_WEIGHT = 10
"""How many times the lower median of the sites' patients a site counts for in the mean over all sites."""
QUARTERS = 4
"""Quartiles are told only if each quarter of the patients is as large as the least group."""


def aggregated(
    scores: Sequence[CaseScores], least: int, evaluation: Evaluation, before: Sequence[CaseScores] = ()
) -> SiteScores | None:
    """Aggregate a site's test scores; None if the site has too few test patients.

    Nothing is told of a class that some, but fewer than ``least`` patients have, or in which it was found. A region or a
    mean with such a class is left out, too, because the class could be computed from it.

    Args:
        scores: the scores of all test cases.
        least: number of patients below which nothing is told.
        evaluation: the run's regions and means.
        before: scores of another adapter on the same cases, whose mean Dice is subtracted.
    """
    if len({score.patient for score in scores}) < least:
        return None
    told = _told(scores, least, evaluation)
    # Means over the classes leave out those of which nothing is told.
    scores = [_of_classes(score, told, evaluation) for score in scores]
    summary = summarise(scores)
    cases = {str(place): score for place, score in enumerate(scores)}
    measures: dict[str, dict[str, Figures]] = defaultdict(dict)
    for measure, named in summary.measures.items():
        for name, mean in named.items():
            values = {place: score.values(measure).get(name) for place, score in cases.items()}
            if name in told and (figures := _figures(mean, values, cases, MEASURES[measure].digits, least)):
                measures[measure][name] = figures
    digits = MEASURES["dice"].digits
    dices = {place: score.mean_dice for place, score in cases.items()}
    means: dict[str, Figures] = {}
    for name, mean in summary.means.items():
        values = {place: score.means.get(name) for place, score in cases.items()}
        if name in told and (figures := _figures(mean, values, cases, digits, least)):
            means[name] = figures
    structures = [name for name in summary.dice if name in told]
    return SiteScores(
        cases=rounded(len(scores)),
        patients=rounded(summary.patients),
        measures=dict(measures),
        mean=_figures(summary.mean, dices, cases, digits, least),
        means=means,
        missed={name: _count(scores, name, (MISSED,), (BOTH, MISSED), least) for name in structures},
        spurious={name: _count(scores, name, (SPURIOUS,), (BOTH, MISSED, SPURIOUS), least) for name in structures},
        difference=_difference(scores, before, told, least, evaluation) if before else None,
    )


def pooled_dice(sites: Mapping[str, Figures | None]) -> Mean | None:
    """The mean Dice over the patients of all sites that told theirs; None if no site has.

    Args:
        sites: site → its figures. Each counts by its number of patients, and for at most ten times the lower median. The
            interval takes the sites as given and is for patients of these sites.
    """
    known = [figures for figures in sites.values() if figures and figures.patients]
    if not known:
        return None
    most = MOST_WEIGHT * median_low(figures.patients for figures in known)
    counts = [min(figures.patients, most) for figures in known]
    total = sum(counts)
    mean = sum(count * figures.mean for count, figures in zip(counts, known, strict=True)) / total
    low = high = None
    if all(figures.deviation is not None for figures in known) and total > len(known):
        squares = sum(count * (figures.deviation or 0.0) ** 2 for count, figures in zip(counts, known, strict=True))
        low, high = t_interval(mean, math.sqrt(squares) / total, total - len(known))
    return Mean(mean, low, high, total, total)


def interval_of(figures: Figures | Differences, highest: float = 1.0, lowest: float = 0.0) -> Mean:
    """A site's mean with its 95 % interval, from the rounded number of its patients."""
    low = high = None
    if figures.deviation is not None and figures.patients > 1:
        error = figures.deviation / math.sqrt(figures.patients)
        low, high = t_interval(figures.mean, error, figures.patients - 1, highest, lowest)
    return Mean(figures.mean, low, high, figures.patients, figures.patients)


@dataclass(frozen=True)
class TestPatients:
    """The patients whose cases a site scores. They change only in groups, so that two runs do not show a single one."""

    known: frozenset[str]
    """Patients that were scored before; empty before the first time."""

    def chosen(self, present: Collection[str], least: int) -> frozenset[str] | None:
        """The patients to score now; None if so few have gone that nothing may be told.

        Args:
            present: the test patients that the site has now.
            least: size of the smallest group of patients that may come or go.
        """
        new, gone = set(present) - self.known, self.known - set(present)
        if not self.known:
            return frozenset(present)
        if gone and len(gone) < least:
            return None
        return frozenset(present) if len(new) >= least else frozenset(set(present) - new)


def _told(scores: Sequence[CaseScores], least: int, evaluation: Evaluation) -> set[str]:
    """Classes, regions and means of which something may be told."""
    names = list(dict.fromkeys(name for score in scores for name in score.dice))
    # Those that have it, those in whom it was found, and those that have a score for it.
    groups = ((BOTH, MISSED), (BOTH,), (BOTH, MISSED, SPURIOUS))
    few = {name for name in names for group in groups if 0 < len(_patients(scores, name, group)) < least}
    few |= {name for name, parts in evaluation.regions.items() if few & set(parts)}
    few |= {name for name, parts in evaluation.means.items() if few & set(parts)}
    return {*names, *evaluation.means} - few


def _of_classes(score: CaseScores, told: set[str], evaluation: Evaluation) -> CaseScores:
    """The scores of a case without the classes of which nothing is told.

    A class that is in neither label map has no score here, whatever the run's rule. As a 1, it would tell how many patients
    have the class.
    """
    shown = {name for name in told if score.outcome.get(name) != ABSENT}
    measures = {
        name: {part: value if part in shown else None for part, value in score.values(name).items() if part in told}
        for name in MEASURES
    }
    means: dict[str, float | None] = {}
    for name, parts in evaluation.means.items():
        present = [value for part in parts if (value := measures["dice"].get(part)) is not None]
        means[name] = math.fsum(present) / len(present) if present else None
    return replace(score, means=means, **measures)


def _patients(scores: Sequence[CaseScores], name: str, outcomes: Collection[str]) -> set[str]:
    """The patients with a case of which a class has one of these outcomes."""
    return {score.patient for score in scores if score.outcome.get(name) in outcomes}


def _count(
    scores: Sequence[CaseScores], name: str, outcomes: Collection[str], among: Collection[str], least: int
) -> int | None:
    """The rounded number of patients with an outcome; None if it, or what is left of all, is small but not 0."""
    found, whole = _patients(scores, name, outcomes), _patients(scores, name, among)
    others = {score.patient for score in scores if score.outcome.get(name) in among and score.outcome[name] not in outcomes}
    small = 0 < len(found) < least or 0 < len(others) < least
    return None if small or len(whole) < least else rounded(len(found))


def _figures(
    mean: Mean | None, values: Mapping[str, float | None], cases: Mapping[str, CaseScores], digits: int, least: int
) -> Figures | None:
    """Figures of a measure; None if too few patients stand behind it.

    Args:
        mean: the mean over the cases.
        values: case → value.
        cases: case → its scores.
        digits: number of digits after the decimal point that are told.
        least: number of patients below which nothing is told.
    """
    if mean is None or mean.patients < least:
        return None
    by_patient: dict[str, list[float]] = defaultdict(list)
    for place, value in values.items():
        if value is not None and not math.isnan(value):
            by_patient[cases[place].patient].append(value)
    own = np.array([math.fsum(found) / len(found) for found in by_patient.values()])
    quartiles = None
    if len(own) >= QUARTERS * least:
        # An ordinary quartile is the value of one patient, or lies between those of two.
        quartiles = [round(float(value), digits) for value in hdquantiles(own, (0.25, 0.5, 0.75))]
    deviation = round(float(own.std(ddof=1)), digits) if len(own) > 1 else None
    return Figures(patients=rounded(len(own)), mean=round(mean.value, digits), deviation=deviation, quartiles=quartiles)


def _difference(
    scores: Sequence[CaseScores], before: Sequence[CaseScores], told: set[str], least: int, evaluation: Evaluation
) -> Differences | None:
    """Mean difference of the cases' mean Dice over the classes of which both adapters' scores may be told."""
    told = told & _told(before, least, evaluation)
    earlier = {score.case: _of_classes(score, told, evaluation).mean_dice for score in before}
    values, patients = {}, {}
    for score in scores:
        one, other = _of_classes(score, told, evaluation).mean_dice, earlier.get(score.case)
        if one is not None and other is not None:
            values[score.case], patients[score.case] = one - other, score.patient
    mean = mean_of([values], patients, lowest=-1.0) if values else None
    if mean is None or mean.patients < least:
        return None
    own: dict[str, list[float]] = defaultdict(list)
    for case, value in values.items():
        own[patients[case]].append(value)
    by_patient = [float(np.mean(found)) for found in own.values()]
    deviation = round(float(np.std(by_patient, ddof=1)), 3) if len(own) > 1 else None
    return Differences(patients=rounded(mean.patients), mean=round(mean.value, 3), deviation=deviation)
