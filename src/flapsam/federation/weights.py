"""How much each client counts."""

from collections.abc import Sequence

from flapsam.config import RunConfig
from flapsam.errors import FlapsamError
from flapsam.sites import Case, Site
from flapsam.volumes import read_geometry, slice_count


def client_weights(sites: Sequence[Site], config: RunConfig) -> dict[str, float]:
    """Each site's weight in the mean, normalised to 1; counted before validation cases are held out.

    Counting slices this way gives the weights that the paper's code holds as numbers for Fed-KiTS19.

    Raises:
        FlapsamError: given weights do not name exactly the sites, or are all 0.
    """
    kind = config.rounds.weights
    if isinstance(kind, dict):
        if kind.keys() != {site.name for site in sites}:
            raise FlapsamError(f"rounds.weights: give one for each of {', '.join(site.name for site in sites)}")
        raw = dict(kind)
    elif kind == "uniform":
        raw = {site.name: 1.0 for site in sites}
    elif kind == "cases":
        raw = {site.name: float(len(site.of("train"))) for site in sites}
    else:
        raw = {site.name: float(sum(_slices(case, config) for case in site.of("train"))) for site in sites}
    total = sum(raw.values())
    if total <= 0:
        raise FlapsamError("rounds.weights: no site has a weight above 0; does any have training cases?")
    return {name: weight / total for name, weight in raw.items()}


def _slices(case: Case, config: RunConfig) -> int:
    return slice_count(*read_geometry(case.image, modalities=True), config.samples.axis)
