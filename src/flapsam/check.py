"""Everything that is wrong with a data set, at once, before any training."""

from collections.abc import Callable

from flapsam.config import Data
from flapsam.errors import FlapsamError
from flapsam.sites import Site, label_map
from flapsam.slices import read_pair


def check_cases(sites: list[Site], data: Data, on_case: Callable[[], None] = lambda: None) -> list[str]:
    """Read every case of every site; returns one sentence for each problem."""
    problems = [f"site {site.name}: it has no training case" for site in sites if not site.of("train")]
    for site in sites:
        mapping = label_map(data, site.name)
        for case in site.cases:
            try:
                read_pair(case, mapping)
            except FlapsamError as error:
                problems.append(str(error))
            on_case()
    return problems
