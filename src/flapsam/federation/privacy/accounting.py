"""What training steps with noise reveal about a patient, as ε and δ."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

from flapsam.base.errors import FlapsamError
from flapsam.run.config import RunConfig

PRECISION = 1e-3
"""Relative width of the interval to which the search for the least noise comes down."""
FINE, COARSE = 1e-4, 1e-3
"""Widths of the bins of privacy losses. Losses are rounded so that ε is an upper bound with either of them."""
LARGE = 10
"""ε from which the fine bins change nothing that matters, and only take long."""


@dataclass(frozen=True, order=True)
class Steps:
    """Training steps of one kind: Poisson sampling of patients, clipping and Gaussian noise."""

    sampling: float
    """Probability with which a patient takes part in a step."""
    noise: float
    """Standard deviation of the noise, as a multiple of the clipping norm."""
    count: int
    """Number of steps."""


def epsilon(steps: Iterable[Steps], delta: float) -> float:
    """What steps reveal about a patient in all: an upper bound of ε, in most cases tight to 1e-3.

    Neighbours are data sets that differ by one patient more or less. The privacy loss distributions of the steps (Koskela et
    al. 2020, arXiv 1906.03049; Doroshenko et al. 2022, arXiv 2207.04380) are composed by Google's ``dp-accounting``.

    Args:
        steps: the steps.
        delta: δ.

    Raises:
        FlapsamError: ``dp-accounting`` is not installed.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for part in steps:
        counts[part.sampling, part.noise] += part.count
    merged = tuple(sorted(Steps(*kind, count) for kind, count in counts.items() if count))
    roughly = _epsilon(merged, delta, COARSE)
    return roughly if roughly >= LARGE else _epsilon(merged, delta, FINE)


def noise_for(epsilon_allowed: float, delta: float, sampling: float, count: int) -> float:
    """The least noise with which steps reveal no more than this, or up to 2 % more, as a multiple of the clipping norm.

    Args:
        epsilon_allowed: the largest ε.
        delta: δ.
        sampling: probability with which a patient takes part in a step.
        count: number of steps.

    Raises:
        FlapsamError: ``dp-accounting`` is not installed.
    """
    return _noise(epsilon_allowed, delta, sampling, count)


def planned(config: RunConfig) -> Steps:
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
    return Steps(privacy.sampling, noise_for(privacy.epsilon, privacy.delta, privacy.sampling, count), count)


@lru_cache(maxsize=256)
def _epsilon(steps: tuple[Steps, ...], delta: float, width: float) -> float:
    if not steps:
        return 0.0
    library = _library()
    accountant = library.pld.PLDAccountant(value_discretization_interval=width)
    for part in steps:
        step = library.PoissonSampledDpEvent(part.sampling, library.GaussianDpEvent(part.noise))
        accountant.compose(step, part.count)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def _noise(epsilon_allowed: float, delta: float, sampling: float, count: int) -> float:
    one = Steps(sampling, 1.0, count)

    def enough(noise: float) -> bool:
        return _epsilon((replace(one, noise=noise),), delta, COARSE) <= epsilon_allowed

    high = 1.0
    while not enough(high):
        high *= 2
    low = high / 2
    while enough(low):
        low, high = low / 2, low
    while high > low * (1 + PRECISION):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _library() -> ModuleType:
    try:
        import dp_accounting
        import dp_accounting.pld
    except ModuleNotFoundError as error:
        raise FlapsamError("privacy needs another package; run pip install 'flapsam[privacy]'") from error
    return dp_accounting
