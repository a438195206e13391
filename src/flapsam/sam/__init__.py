"""The Segment Anything network: encoder, decoder, fine-tuning strategies with their adapters, and checkpoints."""

from flapsam.sam.architecture import Architecture
from flapsam.sam.assembly import Assembled, Origin, assemble, assemble_run
from flapsam.sam.checkpointing import checkpoint_layers
from flapsam.sam.checkpoints import LoadReport, load_checkpoint, read_checkpoint
from flapsam.sam.families import ARCHITECTURES, architecture, infer_architecture
from flapsam.sam.fusion import fuse
from flapsam.sam.lora import (
    adapted_weights,
    apply_strategy,
    frozen_checksum,
    load_tensors,
    load_trained,
    lora_config,
    merge_adapters,
    named_parameters,
    only_these_train,
    tensors_of,
    trained,
    trained_state,
    travelling,
    travelling_state,
)
from flapsam.sam.network import PIXELS, Sam, build
from flapsam.sam.strategies import STRATEGIES, Strategy, strategy

__all__ = [
    "ARCHITECTURES",
    "PIXELS",
    "STRATEGIES",
    "Architecture",
    "Assembled",
    "LoadReport",
    "Origin",
    "Sam",
    "Strategy",
    "adapted_weights",
    "apply_strategy",
    "architecture",
    "assemble",
    "assemble_run",
    "build",
    "checkpoint_layers",
    "frozen_checksum",
    "fuse",
    "infer_architecture",
    "load_checkpoint",
    "load_tensors",
    "load_trained",
    "lora_config",
    "merge_adapters",
    "named_parameters",
    "only_these_train",
    "read_checkpoint",
    "strategy",
    "tensors_of",
    "trained",
    "trained_state",
    "travelling",
    "travelling_state",
]
