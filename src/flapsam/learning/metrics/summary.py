"""Means of scores over cases, with intervals over patients."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flapsam.learning.metrics.case import MISSED, SPURIOUS, CaseScores, scores_of
from flapsam.learning.metrics.interval import FEW, Mean, mean_of
from flapsam.learning.metrics.measures import MEASURES
from flapsam.run.ledger import CaseTested, Event


@dataclass(frozen=True)
class Summary:
    """Mean scores over cases, per class or region and over the classes."""

    cases: int
    patients: int
    measures: dict[str, dict[str, Mean | None]]
    """Measure → class or region → its mean. Measures that no case has are left out."""
    mean: Mean | None
    """Mean of the classes' mean Dices, without the regions."""
    means: dict[str, Mean | None]
    """Name of a mean → its mean Dice."""
    missed: dict[str, int]
    """Class or region → number of cases in which the prediction lacks it."""
    spurious: dict[str, int]
    """Class or region → number of cases in which the prediction alone has it."""
    outcomes: dict[str, int]
    """Class or region → number of cases of which it is known whether it was missed."""

    @property
    def mean_dice(self) -> float | None:
        """The value of ``mean``."""
        return self.mean.value if self.mean else None

    @property
    def dice(self) -> dict[str, float | None]:
        """Class or region → mean Dice."""
        return self.values("dice")

    @property
    def hd95(self) -> dict[str, float | None]:
        """Class or region → mean 95 % Hausdorff distance in mm."""
        return self.values("hd95")

    def values(self, measure: str) -> dict[str, float | None]:
        """Class or region → mean of a measure, without its interval."""
        return {name: mean.value if mean else None for name, mean in self.measures.get(measure, {}).items()}

    def as_json(self) -> dict[str, Any]:
        """The means for other programs, with the plain numbers of Dice and distance besides."""
        return {**asdict(self), "dice": self.dice, "hd95": self.hd95, "mean_dice": self.mean_dice}


@dataclass(frozen=True)
class Spread:
    """How the sites differ in mean Dice."""

    best: str
    worst: str
    best_dice: float
    worst_dice: float

    @property
    def gap(self) -> float:
        """Best minus worst."""
        return self.best_dice - self.worst_dice


def summarise(scores: Sequence[CaseScores]) -> Summary:
    """Average scores over the cases, with a 95 % interval over patients for every mean."""
    patients = {str(place): score.patient for place, score in enumerate(scores)}
    structures = list(dict.fromkeys(name for score in scores for name in score.dice))
    averaged: dict[str, dict[str, Mean | None]] = {}
    for measure in MEASURES.values():
        means = {
            name: mean_of([_present(scores, measure.name, name)], patients, measure.highest)
            for name in structures
            if any(name in score.values(measure.name) for score in scores)
        }
        if means and (measure.name == "dice" or any(means.values())):
            averaged[measure.name] = means
    classes = list(dict.fromkeys(name for score in scores for name in score.classes))
    outcomes = {name: [score.outcome.get(name) for score in scores] for name in structures}
    return Summary(
        cases=len(scores),
        patients=len(set(patients.values())),
        measures=averaged,
        mean=mean_of([_present(scores, "dice", name) for name in classes], patients),
        means={
            name: mean_of([_present(scores, "means", name)], patients)
            for name in dict.fromkeys(name for score in scores for name in score.means)
        },
        missed={name: found.count(MISSED) for name, found in outcomes.items()},
        spurious={name: found.count(SPURIOUS) for name, found in outcomes.items()},
        outcomes={name: sum(one is not None for one in found) for name, found in outcomes.items()},
    )


def spread_of(dices: Mapping[str, float | None]) -> Spread | None:
    """The best and the worst of the sites; None if fewer than two have a Dice.

    Args:
        dices: site → mean Dice.
    """
    known = {site: value for site, value in dices.items() if value is not None}
    if len(known) < 2:
        return None
    best, worst = (choose(known, key=lambda site: known[site]) for choose in (max, min))
    return Spread(best, worst, known[best], known[worst])


def spread(scores: Iterable[CaseScores]) -> Spread | None:
    """The best and the worst of the sites with scores; None if fewer than two have a Dice."""
    return spread_of({site: summarise(part).mean_dice for site, part in by_site(scores).items()})


def few_patients(summary: Summary) -> str:
    """A sentence that warns of few patients. Empty if there are enough."""
    if summary.patients >= FEW:
        return ""
    count = "patient" if summary.patients == 1 else "patients"
    return f"Only {summary.patients} {count}: small differences may be chance, and others may give other scores."


def rule_for_absent(scores: Iterable[CaseScores]) -> str:
    """A sentence that names the Dice of classes that are in neither the truth nor the prediction of a case."""
    rules = {score.absent for score in scores}
    if rules == {"one"}:
        return "A class that is in neither the truth nor the prediction of a case has a Dice of 1 there."
    if rules <= {"none"}:
        return "A class that is in neither the truth nor the prediction of a case has no Dice there, and means leave it out."
    return (
        "Where a class is in neither the truth nor the prediction, some cases have a Dice of 1, as in earlier versions, and "
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
    sites = {site: summarise(part) for site, part in by_site(scores).items()}
    between = spread(scores)
    return {
        "pooled": summarise(scores).as_json(),
        "sites": {site: summary.as_json() for site, summary in sites.items()},
        "spread": {**asdict(between), "gap": between.gap} if between else None,
        "cases": [asdict(case) for case in scores],
        "absent": rule_for_absent(scores),
        "missing": missing_cases(scores),
    }


def _present(scores: Sequence[CaseScores], measure: str, name: str) -> dict[str, float]:
    """Place of a case in the list → its value, for those that have one."""
    found: dict[str, float] = {}
    for place, score in enumerate(scores):
        value = score.values(measure).get(name)
        if value is not None and not math.isnan(value):
            found[str(place)] = value
    return found
