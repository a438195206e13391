"""The network: encoder, decoder, strategies with their adapters, checkpoints."""

from flapsam.sam.adapters import (
    apply_strategy,
    frozen_checksum,
    load_travelling,
    lora_config,
    merge_adapters,
    named_parameters,
    travelling,
    travelling_state,
)
from flapsam.sam.architecture import ARCHITECTURES, Architecture, architecture
from flapsam.sam.assembly import Assembled, assemble, assemble_run
from flapsam.sam.checkpoints import LoadReport, infer_architecture, load_weights, read_checkpoint
from flapsam.sam.network import PIXELS, Sam, build
from flapsam.sam.strategies import STRATEGIES, Strategy, strategy

__all__ = [
    "ARCHITECTURES",
    "PIXELS",
    "STRATEGIES",
    "Architecture",
    "Assembled",
    "LoadReport",
    "Sam",
    "Strategy",
    "apply_strategy",
    "architecture",
    "assemble",
    "assemble_run",
    "build",
    "frozen_checksum",
    "infer_architecture",
    "load_travelling",
    "load_weights",
    "lora_config",
    "merge_adapters",
    "named_parameters",
    "read_checkpoint",
    "strategy",
    "travelling",
    "travelling_state",
]
