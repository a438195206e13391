"""How clients' tensors become the global ones: one small file an aggregator, behind one registry."""

from collections.abc import Callable

from flapsam.errors import choose
from flapsam.federation.aggregation.aggregator import Aggregator
from flapsam.federation.aggregation.fedavg import FedAvg
from flapsam.federation.aggregation.flexlora import FlexLora

AGGREGATORS: dict[str, Callable[[int], Aggregator]] = {
    "fedavg": FedAvg,
    "flexlora": FlexLora,
}
"""Name → a function from the adapters' rank to an aggregator for one round. A new aggregator is one entry here."""

__all__ = ["AGGREGATORS", "Aggregator", "aggregator"]


def aggregator(name: str, rank: int) -> Aggregator:
    """A new aggregator of this name.

    Raises:
        FlapsamError: there is none of that name.
    """
    return choose("aggregator", name, AGGREGATORS)(rank)
