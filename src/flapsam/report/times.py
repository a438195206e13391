"""Where the time of a run went, from its ledger."""

from dataclasses import dataclass
from datetime import datetime

from flapsam.report.run import Run
from flapsam.run.ledger import Cohort, CohortEvent, Fitted, RoundClosed


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of a mode by phase."""

    fits: float
    aggregation: float
    rest: float
    """What the rounds took beyond fits and aggregation."""
    after: float
    """Validation at the end, and test."""

    @property
    def total(self) -> float:
        """All phases together."""
        return self.fits + self.aggregation + self.rest + self.after


@dataclass(frozen=True)
class SiteTimes:
    """What a site's fits took in one mode."""

    mode: str
    site: str
    seconds: float
    waiting: float
    """Seconds of these in which the network waited for slices."""
    steps: float


def phase_times(run: Run) -> dict[str, PhaseTimes]:
    """Mode → its times, for every mode that has closed a round."""
    return {mode: _phases(run, mode) for mode in run.modes if run.rounds(mode)}


def site_times(run: Run) -> list[SiteTimes]:
    """The times of every mode and site, for sites that report the seconds of their fits."""
    rows = []
    for mode in run.modes:
        waiting, steps = run.fits(mode, lambda fit: fit.waiting), run.fits(mode, lambda fit: fit.steps)
        for site, points in run.fits(mode, lambda fit: fit.seconds).items():
            waited, done = (sum(series.get(site, {}).values()) for series in (waiting, steps))
            rows.append(SiteTimes(mode, site, sum(points.values()), waited, done))
    return rows


def _phases(run: Run, mode: str) -> PhaseTimes:
    fits, aggregation, rest = 0.0, 0.0, 0.0
    fitting: dict[tuple[Cohort, int], list[float]] = {}
    side_by_side = False
    for event in run.of(Fitted, mode):
        seconds = event.seconds or event.site_seconds or 0.0
        fitting.setdefault((event.cohort, event.round), []).append(seconds)
        # Only an engine between hospitals measures what a site took.
        side_by_side = side_by_side or event.site_seconds is not None
    for event in run.of(RoundClosed, mode):
        left = event.seconds - event.aggregation_seconds
        of_sites = fitting.get((event.cohort, event.round), [])
        # One after another they take their sum; side by side that may be more than the round took.
        slowest_counts = side_by_side or sum(of_sites) > left
        fit = min(max(of_sites, default=0.0), left) if slowest_counts else sum(of_sites)
        fits += fit
        aggregation += event.aggregation_seconds
        rest += left - fit
    return PhaseTimes(fits, aggregation, rest, _after_rounds(run, mode))


def _after_rounds(run: Run, mode: str) -> float:
    """From the end of each cohort's last round to its last event. The ledger has whole seconds."""
    closed: dict[Cohort, datetime] = {}
    last: dict[Cohort, datetime] = {}
    for event in run.of(CohortEvent, mode):
        last[event.cohort] = event.time
        if isinstance(event, RoundClosed):
            closed[event.cohort] = event.time
    return sum(max((last[cohort] - time).total_seconds(), 0.0) for cohort, time in closed.items())
