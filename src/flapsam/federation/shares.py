"""The share of each client in the mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import TypeVar

from flapsam.base.errors import FlapsamError
from flapsam.run.config import Rounds, RunConfig
from flapsam.sites import Case
from flapsam.volumes import read_geometry, slice_count


@dataclass(frozen=True)
class TrainingSize:
    """Amount of a site's training data, counted before validation cases are held out."""

    cases: int
    slices: int


Size = TypeVar("Size", bound=TrainingSize)


def rounded(count: int) -> int:
    """Round a count to a multiple of 5, or from 100 to two significant digits, but not to 0 unless it is 0.

    A hospital's counts leave it rounded, so that two runs do not tell whether one patient came between them.

    Args:
        count: a number of cases or slices.
    """
    if count <= 0:
        return 0
    step = 5 if count < 100 else 10 ** (len(str(count)) - 2)
    return max((2 * count + step) // (2 * step), 1) * step


def training_size(cases: Sequence[Case], config: RunConfig) -> TrainingSize:
    """Count a site's training cases and their slices from the files' headers."""
    return TrainingSize(len(cases), sum(_slices(case, config) for case in cases))


def client_shares(sizes: Mapping[str, TrainingSize], options: Rounds) -> dict[str, float]:
    """Each site's share in the mean. The shares add up to 1.

    Counted by slices, the shares for Fed-KiTS19 equal the numbers that are hard-coded in the paper's code.

    Args:
        sizes: each site's training data, by name.
        options: the rounds' options, whose ``weights`` say what the shares depend on.

    Raises:
        FlapsamError: the given weights do not name exactly the sites, or the shares would all be 0.
    """
    kind = options.weights
    if isinstance(kind, dict):
        if kind.keys() != sizes.keys():
            raise FlapsamError(f"rounds.weights: the names do not match the sites; give one for each of {', '.join(sizes)}")
        raw = dict(kind)
    elif kind == "uniform":
        raw = dict.fromkeys(sizes, 1.0)
    else:
        raw = {name: float(getattr(size, kind)) for name, size in sizes.items()}
    total = sum(raw.values())
    if total <= 0:
        raise FlapsamError("rounds.weights: every site's share is 0; check these weights and the sites' training cases")
    return {name: weight / total for name, weight in raw.items()}


def weights_of(options: Rounds) -> dict[str, float] | None:
    """The weights that the configuration gives the sites, by name; None if it gives none."""
    return dict(options.weights) if isinstance(options.weights, dict) else None


def bounded(sizes: Mapping[str, Size], options: Rounds) -> dict[str, Size]:
    """Cut off what a site claims to have beyond ``options.max_weight`` times the lower median of the sites.

    From three sites on, a site does not count for more than all others together either. Between two sites, this would make
    both equal.

    Args:
        sizes: each site's training data, by name, as the site itself reports it.
        options: the rounds' options. Only the count that ``weights`` uses is bounded.

    Returns:
        The same sizes, with the counts that are too large replaced.
    """
    kind, most = options.weights, options.max_weight
    if most is None or kind not in ("slices", "cases") or not sizes:
        return dict(sizes)
    counts = {name: getattr(size, kind) for name, size in sizes.items()}
    limit = int(most * median_low(counts.values()))
    if len(counts) > 2:
        # Only the largest site can have more than all others together.
        limit = min(limit, sum(sorted(counts.values())[:-1]))
    return {name: replace(size, **{kind: limit}) if counts[name] > limit else size for name, size in sizes.items()}


def _slices(case: Case, config: RunConfig) -> int:
    return slice_count(*read_geometry(case.image, modalities=True), config.samples.axis)
