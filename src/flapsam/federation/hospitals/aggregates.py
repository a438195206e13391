"""Test scores of a site as they may leave it: summary figures over its patients."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import numpy as np
from numpy.typing import NDArray
from scipy.stats.mstats import hdquantiles

from flapsam.federation.shares import rounded
from flapsam.learning.metrics import MEASURES, CaseScores, Mean, mean
from flapsam.learning.metrics.case import ABSENT, BOTH, MISSED, SPURIOUS
from flapsam.learning.metrics.interval import t_interval
from flapsam.run.config import Evaluation
from flapsam.run.site_scores import Differences, Figures, SiteScores

MOST_WEIGHT = 10
"""How many times the lower median of the sites' patients a site counts for in the mean over all sites."""
QUARTERS = 4
"""A site tells quartiles only if each quarter of the patients is as large as the least group."""


def aggregated(
    scores: Sequence[CaseScores], least: int, evaluation: Evaluation, before: Sequence[CaseScores] = ()
) -> SiteScores | None:
    """Aggregate a site's test scores; None if the site has too few test patients.

    A site tells nothing of a class that some, but fewer than ``least`` patients have, or in whom it was found. A region or a
    mean with such a class is left out, too, because the class could be computed from it.

    Args:
        scores: the scores of all test cases.
        least: number of patients below which a site tells nothing.
        evaluation: the run's regions and means.
        before: scores of another adapter on the same cases, whose mean Dice is subtracted.
    """
    if len({score.patient for score in scores}) < least:
        return None
    told = _told(scores, least, evaluation)
    # Means over the classes leave out the withheld ones.
    scores = [_of_classes(score, told, evaluation) for score in scores]
    structures = [name for name in dict.fromkeys(name for score in scores for name in score.dice) if name in told]
    measures: dict[str, dict[str, Figures]] = defaultdict(dict)
    for name in structures:
        for measure in MEASURES.values():
            values = _by_patient(scores, [score.values(measure.name).get(name) for score in scores])
            if figures := _figures(values, measure.digits, least):
                measures[measure.name][name] = figures
    digits, means = MEASURES["dice"].digits, {}
    for name, parts in evaluation.means.items():
        values = _by_patient(scores, [score.means.get(name) for score in scores])
        if name in told and _alike(scores, parts, least) and (figures := _figures(values, digits, least)):
            means[name] = figures
    return SiteScores(
        cases=rounded(len(scores)),
        patients=rounded(len({score.patient for score in scores})),
        measures=dict(measures),
        mean=_mean_over_classes(scores, least),
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


TestCase = tuple[str, str, str]
"""Subject, name and checksum of the label map of a test case."""


def unchanged(known: Collection[TestCase], present: Collection[TestCase], least: int) -> set[TestCase] | None:
    """The cases to score: those that were scored before, and new ones once they are of enough patients.

    Otherwise, the answers of two runs would show the score of a patient who has come or gone, or of a case.

    Args:
        known: the cases that were scored before; empty before the first time.
        present: the test cases that the site has now.
        least: number of patients below which cases may neither come nor go.

    Returns:
        The cases, or None if cases of so few patients have gone or changed that nothing may be told.
    """
    new, gone = set(present) - set(known), set(known) - set(present)
    if not known:
        return set(present)
    if gone and len({subject for subject, *_ in gone}) < least:
        return None
    return set(present) if len({subject for subject, *_ in new}) >= least else set(present) - new


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
    """The scores of a case without the withheld classes.

    A class that is in neither label map has no score here, whatever the run's rule. As a 1, it would tell how many patients
    have the class.
    """
    shown = {name for name in told if score.outcome.get(name) != ABSENT}
    measures = {
        name: {part: value if part in shown else None for part, value in score.values(name).items() if part in told}
        for name in MEASURES
    }
    means = {name: mean(measures["dice"].get(part) for part in parts) for name, parts in evaluation.means.items()}
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


def _by_patient(scores: Sequence[CaseScores], values: Sequence[float | None]) -> NDArray[np.float64]:
    """The mean of each patient's values, for the patients with any."""
    own: dict[str, list[float]] = defaultdict(list)
    for score, value in zip(scores, values, strict=True):
        if value is not None and not math.isnan(value):
            own[score.patient].append(value)
    return np.array([math.fsum(found) / len(found) for found in own.values()])


def _alike(scores: Sequence[CaseScores], parts: Sequence[str], least: int, before: Sequence[CaseScores] = ()) -> bool:
    """Whether the same classes have a score in all cases, or else in those of enough patients.

    A mean over the classes that a case has would show the scores of the few patients who lack one.
    """
    earlier = {score.case: score for score in before}
    patients: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for score in scores:
        both = [score, earlier[score.case]] if score.case in earlier else [score]
        have = tuple(f"{place} {name}" for place, one in enumerate(both) for name in parts if one.dice.get(name) is not None)
        patients[have].add(score.patient)
    return all(len(found) >= least for have, found in patients.items() if have)


def _figures(values: NDArray[np.float64], digits: int, least: int) -> Figures | None:
    """Figures of a measure; None if too few patients stand behind it.

    Args:
        values: the patients' values.
        digits: number of digits after the decimal point that a site tells.
        least: number of patients below which a site tells nothing.
    """
    if len(values) < least:
        return None
    quartiles = None
    if len(values) >= QUARTERS * least:
        # An ordinary quartile is the value of one patient, or lies between those of two.
        quartiles = [round(float(value), digits) for value in hdquantiles(values, (0.25, 0.5, 0.75))]
    return Figures(
        patients=rounded(len(values)),
        mean=round(float(values.mean()), digits),
        deviation=_deviation(values, digits),
        quartiles=quartiles,
    )


def _mean_over_classes(scores: Sequence[CaseScores], least: int) -> Figures | None:
    """The mean of the classes' mean Dices. A site tells its deviation only if that shows nothing of who lacks a class."""
    classes = list(dict.fromkeys(name for score in scores for name in score.classes))
    of_classes = [_by_patient(scores, [score.dice.get(name) for score in scores]) for name in classes]
    means = [float(values.mean()) for values in of_classes if len(values) >= least]
    whole = _by_patient(scores, [score.mean_dice for score in scores])
    if not means or len(whole) < least:
        return None
    digits = MEASURES["dice"].digits
    deviation = _deviation(whole, digits) if _alike(scores, classes, least) else None
    return Figures(patients=rounded(len(whole)), mean=round(math.fsum(means) / len(means), digits), deviation=deviation)


def _deviation(values: NDArray[np.float64], digits: int) -> float | None:
    return round(float(values.std(ddof=1)), digits) if len(values) > 1 else None


def _difference(
    scores: Sequence[CaseScores], before: Sequence[CaseScores], told: set[str], least: int, evaluation: Evaluation
) -> Differences | None:
    """Mean difference of the cases' mean Dice over the classes of which both adapters' scores may be told."""
    told = told & _told(before, least, evaluation)
    before = [_of_classes(score, told, evaluation) for score in before]
    scores = [_of_classes(score, told, evaluation) for score in scores]
    classes = list(dict.fromkeys(name for score in scores for name in score.classes))
    earlier = {score.case: score.mean_dice for score in before}
    changes = [
        None if score.mean_dice is None or (old := earlier.get(score.case)) is None else score.mean_dice - old
        for score in scores
    ]
    values = _by_patient(scores, changes)
    if len(values) < least or not _alike(scores, classes, least, before):
        return None
    return Differences(patients=rounded(len(values)), mean=round(float(values.mean()), 3), deviation=_deviation(values, 3))
