"""Time of a run by phase and site, from its ledger."""

from dataclasses import dataclass
from datetime import datetime

from flapsam.report.run import Run
from flapsam.run.ledger import Cohort, CohortEvent, Fitted, RoundClosed


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds that a mode spent in each phase."""

    fits: float
    """Seconds of training at the sites."""
    aggregation: float
    """Seconds of aggregation by the server."""
    rest: float
    """Seconds of the rounds without training and aggregation."""
    after: float
    """Seconds of the final validation and the test."""

    @property
    def total(self) -> float:
        """Seconds of all phases together."""
        return self.fits + self.aggregation + self.rest + self.after


@dataclass(frozen=True)
class SiteTimes:
    """Training time of a site in one mode."""

    mode: str
    site: str
    seconds: float
    """Seconds of all fits."""
    waiting: float
    """Seconds of the fits in which the network waited for slices."""
    steps: float
    """Number of training steps."""


def phase_times(run: Run) -> dict[str, PhaseTimes]:
    """Mode → its times by phase, for every mode with at least one closed round."""
    return {mode: _phases(run, mode) for mode in run.modes if run.rounds(mode)}


def site_times(run: Run) -> list[SiteTimes]:
    """Training times by mode and site, for the sites that report the seconds of their fits."""
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
        # Only the engine between hospitals measures a site's seconds, and there sites train in parallel.
        side_by_side = side_by_side or event.site_seconds is not None
    for event in run.of(RoundClosed, mode):
        left = event.seconds - event.aggregation_seconds
        of_sites = fitting.get((event.cohort, event.round), [])
        # Fits in sequence take their sum. A sum that exceeds the round's time shows that the fits ran in parallel.
        slowest_counts = side_by_side or sum(of_sites) > left
        fit = min(max(of_sites, default=0.0), left) if slowest_counts else sum(of_sites)
        fits += fit
        aggregation += event.aggregation_seconds
        rest += left - fit
    return PhaseTimes(fits, aggregation, rest, _after_rounds(run, mode))


def _after_rounds(run: Run, mode: str) -> float:
    """Seconds from each cohort's last round to its last event, in whole seconds as in the ledger."""
    closed: dict[Cohort, datetime] = {}
    last: dict[Cohort, datetime] = {}
    for event in run.of(CohortEvent, mode):
        last[event.cohort] = event.time
        if isinstance(event, RoundClosed):
            closed[event.cohort] = event.time
    return sum(max((last[cohort] - time).total_seconds(), 0.0) for cohort, time in closed.items())
