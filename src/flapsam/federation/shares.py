"""How much each client counts: its share in the mean."""

from collections.abc import Mapping
from dataclasses import dataclass

from flapsam.base.errors import FlapsamError
from flapsam.run.config import Rounds, RunConfig
from flapsam.sites import Case, Site
from flapsam.volumes import read_geometry, slice_count


@dataclass(frozen=True)
class TrainingSize:
    """What a site brings, counted before validation cases are held out."""

    cases: int
    slices: int


def training_size(site: Site, config: RunConfig) -> TrainingSize:
    """What a site brings, from its files' headers."""
    cases = site.of("train")
    return TrainingSize(len(cases), sum(_slices(case, config) for case in cases))


def client_shares(sizes: Mapping[str, TrainingSize], options: Rounds) -> dict[str, float]:
    """Each site's share in the mean. Shares add up to 1.

    Counting slices this way gives the weights that the paper's code holds as numbers for Fed-KiTS19.

    Raises:
        FlapsamError: given weights do not name exactly the sites, or are all 0.
    """
    kind = options.weights
    if isinstance(kind, dict):
        if kind.keys() != sizes.keys():
            raise FlapsamError(f"rounds.weights: give one for each of {', '.join(sizes)}")
        raw = dict(kind)
    elif kind == "uniform":
        raw = dict.fromkeys(sizes, 1.0)
    else:
        raw = {name: float(getattr(size, kind)) for name, size in sizes.items()}
    total = sum(raw.values())
    if total <= 0:
        raise FlapsamError("rounds.weights: no site has a weight above 0; does any have training cases?")
    return {name: weight / total for name, weight in raw.items()}


def _slices(case: Case, config: RunConfig) -> int:
    return slice_count(*read_geometry(case.image, modalities=True), config.samples.axis)
