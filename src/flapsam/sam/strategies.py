"""Fine-tuning strategies, as lists of what trains and travels (FLAP-SAM, arXiv 2407.21739, Figure 1)."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from flapsam.base.errors import choose
from flapsam.sam.slice_adapters import CHILD

OUTPUT = "mask_decoder.output.*"


@dataclass(frozen=True)
class Strategy:
    """A way of fine-tuning: whether low-rank adapters are added, and which of SAM's own parameters train."""

    name: str
    paper_name: str
    lora: bool
    """Whether attention projections get adapters, which train and travel. The configuration's ``lora`` says which."""
    trains: tuple[str, ...]
    """Shell-style patterns of the names of SAM's own parameters that train."""
    volume: bool = False
    """Whether neighbouring slices meet in small adapters after the encoder's attentions, which train and travel."""

    def selects(self, parameter: str) -> bool:
        """Whether the parameter with this name trains and travels."""
        adapter = ".lora_" in parameter or f".{CHILD}." in parameter
        return adapter or any(fnmatchcase(parameter, pattern) for pattern in self.trains)


_ALL = (
    Strategy("full", "FullFT", lora=False, trains=("*",)),
    Strategy(
        "attention",
        "AttnFT",
        lora=False,
        trains=("*.attn.*", "*.self_attn.*", "*.cross_attn_*", "*.final_attn_token_to_image.*", OUTPUT),
    ),
    Strategy("decoder", "DecFT", lora=False, trains=("mask_decoder.*",)),
    Strategy("partial-decoder", "PDecFT", lora=False, trains=(OUTPUT,)),
    Strategy("lora", "LoRA", lora=True, trains=()),
    Strategy("lora-decoder", "LoRA + decoder", lora=True, trains=("mask_decoder.*",)),
    Strategy("flap", "FLAP-SAM", lora=True, trains=(OUTPUT,)),
    Strategy("flap-volume", "FLAP-SAM + slices", lora=True, trains=(OUTPUT,), volume=True),
)

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}
"""Name → strategy. A new strategy is one entry above."""


def strategy(name: str) -> Strategy:
    """The strategy of this name.

    Raises:
        FlapsamError: the name is unknown.
    """
    return choose("strategy", name, STRATEGIES)
