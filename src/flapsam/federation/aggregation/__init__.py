"""How clients' tensors become the global ones: one small file per aggregator, and a registry."""

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
"""Name → function from the adapters' rank to an aggregator. To add an aggregator, add an entry."""

__all__ = ["AGGREGATORS", "Aggregator", "Reply", "aggregator"]


def aggregator(name: str, rank: int) -> Aggregator:
    """Make an aggregator by name.

    Args:
        name: a key of ``AGGREGATORS``.
        rank: the adapters' rank in the run.

    Raises:
        FlapsamError: the name is unknown.
    """
    return choose("aggregator", name, AGGREGATORS)(rank)
