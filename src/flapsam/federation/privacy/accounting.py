"""What training steps with noise reveal about a patient, as ε and δ."""

import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from flapsam.base.errors import FlapsamError
from flapsam.run.config import RunConfig

PRECISION = 1e-3
"""Relative width of the interval at which the search for the least noise stops."""
LEAST = 0.3
"""Least noise, as a multiple of the clipping norm. Less takes long to account for, and no sensible ε needs it."""
FINE, COARSE = 1e-4, 1e-3
"""Widths of the bins of privacy losses. Losses are rounded up, so that ε is an upper bound with either of them."""
LARGE = 10
"""ε from which the fine bins change nothing that matters and only take longer."""


@dataclass(frozen=True)
class Steps:
    """Training steps of one kind: Poisson sampling of patients, clipping and Gaussian noise."""

    sampling: float
    """Probability with which a patient takes part in a step."""
    noise: float
    """Standard deviation of the noise, as a multiple of the clipping norm."""
    count: int
    """Number of steps."""


@dataclass(frozen=True)
class Plan:
    """What a private run may do at a site."""

    steps: Steps
    """All steps that it may take."""
    epsilon: float
    """The ε that the run declares, which these steps do not exceed."""
    delta: float
    """The δ that the run declares."""

    def keeps(self, earlier: "Plan") -> bool:
        """Whether a run goes on as it began. The noise may differ by the rounding of another machine or library."""
        same = (self.steps.sampling, self.epsilon, self.delta) == (earlier.steps.sampling, earlier.epsilon, earlier.delta)
        return same and self.steps.noise > 0.99 * earlier.steps.noise


def epsilon(steps: Steps, delta: float) -> float:
    """What steps reveal about a patient: an upper bound on ε, in most cases tight to 1e-3.

    Neighbours are data sets that differ in the presence of one patient. Google's ``dp-accounting`` composes the privacy loss
    distributions of the steps (Koskela et al. 2020, arXiv 1906.03049; Doroshenko et al. 2022, arXiv 2207.04380).

    Args:
        steps: the steps.
        delta: δ.

    Raises:
        FlapsamError: ``dp-accounting`` is not installed.
    """
    roughly = _epsilon(steps, delta, COARSE)
    return roughly if roughly >= LARGE else _epsilon(steps, delta, FINE)


@lru_cache(maxsize=64)
def noise_for(epsilon_allowed: float, delta: float, sampling: float, count: int) -> float:
    """The least noise with which steps reveal no more than this, as a multiple of the clipping norm.

    It may be up to 2 % too high, but never too low.

    Args:
        epsilon_allowed: the largest ε.
        delta: δ.
        sampling: probability with which a patient takes part in a step.
        count: number of steps.

    Raises:
        FlapsamError: ``dp-accounting`` is not installed.
    """

    def enough(noise: float) -> bool:
        return _epsilon(Steps(sampling, noise, count), delta, COARSE) <= epsilon_allowed

    # Near the answer, since the accounting of far less noise takes long: what many steps come close to (arXiv 1911.11607).
    high = max(LEAST, sampling * math.sqrt(2 * count * math.log(1 / delta)) / epsilon_allowed)
    while not enough(high):
        high *= 2
    low = max(LEAST, high / 2)
    while high > LEAST and enough(low):
        low, high = max(LEAST, low / 2), low
    while high > low * (1 + PRECISION):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def planned(config: RunConfig) -> Plan:
    """All steps that a run may take at a site, with the noise that its ε and δ ask for.

    Args:
        config: the run's configuration, which has ``privacy``.

    Raises:
        FlapsamError: ``dp-accounting`` is not installed.
    """
    privacy, rounds = config.privacy, config.rounds
    if privacy is None or rounds.steps is None:
        raise ValueError("the run is not private")
    count = (rounds.count + privacy.repeats) * rounds.steps
    noise = noise_for(privacy.epsilon, privacy.delta, privacy.sampling, count)
    return Plan(Steps(privacy.sampling, noise, count), privacy.epsilon, privacy.delta)


def _epsilon(steps: Steps, delta: float, width: float) -> float:
    library = _library()
    accountant = library.pld.PLDAccountant(value_discretization_interval=width)
    step = library.PoissonSampledDpEvent(steps.sampling, library.GaussianDpEvent(steps.noise))
    accountant.compose(step, steps.count)
    return float(accountant.get_epsilon(delta))


def _library() -> ModuleType:
    try:
        import dp_accounting
        import dp_accounting.pld
    except ModuleNotFoundError as error:
        raise FlapsamError("privacy needs another package; run pip install 'flapsam[privacy]'") from error
    return dp_accounting
