"""How many false sites a robust aggregator bears, said at the start of a run."""

from flapsam.base.errors import FlapsamError
from flapsam.federation.aggregation import Aggregator, aggregator
from flapsam.run.config import RunConfig
from flapsam.run.ledger import TOGETHER, FalseSitesBorne


def false_sites_borne(config: RunConfig, sites: int, least: int) -> FalseSitesBorne | None:
    """The event that says it; None for an aggregator that is not made to bear any.

    Args:
        config: the run's configuration.
        sites: number of sites that take part with a weight above 0.
        least: least number of answers with which a round is closed.
    """
    method = aggregator(config.aggregator, config.lora.rank)
    borne = method.bears(sites)
    if borne is None:
        return None
    least = min(least, sites)
    return FalseSitesBorne(
        cohort=TOGETHER,
        aggregator=config.aggregator,
        sites=sites,
        borne=borne,
        least=least,
        borne_of_least=method.bears(least) or 0,
    )


def check_borne(config: RunConfig, sites: int) -> None:
    """Refuse a robust aggregator that bears no false site with this many sites.

    Raises:
        FlapsamError: it bears none.
    """
    method = aggregator(config.aggregator, config.lora.rank)
    if method.bears(sites) == 0:
        count = "1 site" if sites == 1 else f"{sites} sites"
        advice = f"use at least {_enough(method, sites)} sites, or choose another aggregator"
        raise FlapsamError(f"aggregator: {config.aggregator} bears no false site among {count}; {advice}")


def _enough(method: Aggregator, sites: int) -> int:
    """The number of sites from which on the aggregator bears one."""
    while not method.bears(sites):
        sites += 1
    return sites
