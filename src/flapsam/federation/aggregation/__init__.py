"""How clients' tensors become the global ones: one small file an aggregator, behind one registry."""

from collections.abc import Callable

from flapsam.base.errors import choose
from flapsam.federation.aggregation.aggregator import Aggregator, Reply
from flapsam.federation.aggregation.fedavg import FedAvg
from flapsam.federation.aggregation.fedex_lora import FedExLora
from flapsam.federation.aggregation.ffa_lora import FfaLora
from flapsam.federation.aggregation.flexlora import FlexLora
from flapsam.federation.aggregation.flexlora_aligned import FlexLoraAligned
from flapsam.federation.aggregation.lora_fair import LoraFair
from flapsam.federation.aggregation.median import Median
from flapsam.federation.aggregation.rolora import RoLora
from flapsam.federation.aggregation.trimmed_mean import TrimmedMean

AGGREGATORS: dict[str, Callable[[int], Aggregator]] = {
    "fedavg": FedAvg,
    "flexlora": FlexLora,
    "flexlora-aligned": FlexLoraAligned,
    "ffa-lora": FfaLora,
    "rolora": RoLora,
    "fedex-lora": FedExLora,
    "lora-fair": LoraFair,
    "median": Median,
    "trimmed-mean": TrimmedMean,
}
"""Name → a function from the adapters' rank to an aggregator. A new aggregator is one entry here."""

__all__ = ["AGGREGATORS", "Aggregator", "Reply", "aggregator"]


def aggregator(name: str, rank: int) -> Aggregator:
    """A new aggregator of this name.

    Raises:
        FlapsamError: there is none of that name.
    """
    return choose("aggregator", name, AGGREGATORS)(rank)
