"""Named sets of values for a run's fields. ``preset: fast`` in a configuration sets the fields that it does not give.

``paper`` has the values of arXiv 2407.21739 and its published code, which are also the fields' own defaults. ``fast``
reached the same Dice in the shortest time that we measured. ``benchmarks/results/training.md`` has the measurement of each
value, and ``real_sam.md`` and ``lgg_federating.md`` beside it that of ``lora.projections``. ``private`` is ``fast`` with
differential privacy, in few steps and with few trained parameters; ``benchmarks/results/private.md`` has its measurement.
"""

from collections.abc import Mapping
from typing import Any

_FAST: Mapping[str, Any] = {
    "samples": {"channels": "adjacent"},
    "backbone": {"masks": "warm"},
    "lora": {"projections": ["q", "k", "v", "out"]},
    "training": {
        "window": 1,
        "batch_size": 12,
        "empty_slices": 0.25,
        "augment": "gentle",
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "schedule_epochs": None,
        "schedule_power": 1.0,
        "foreground_weight": 10.0,
    },
    "rounds": {"count": 20},
    "aggregator": "flexlora-aligned",
    "compression": {"codec": "steps"},
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "fast": _FAST,
    "private": {
        **_FAST,
        "lora": {**_FAST["lora"], "rank": 4},
        "training": {**_FAST["training"], "learning_rate": 8e-3, "warmup_steps": 5},
        "rounds": {"count": 10, "steps": 10, "weights": "uniform"},
        "aggregator": "ffa-lora",
        "privacy": {"windows": 2},
    },
}
"""Preset → field, or group of fields → field → value."""


SECURE: Mapping[str, Any] = {
    "aggregator": "fedavg",
    "rounds": {"max_change": None, "min_sites": 3, "weights": "uniform"},
    "training": {"moments": "reset"},
}
"""What secure aggregation needs. It replaces a preset's values."""


def with_preset(tree: Mapping[str, Any], name: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A configuration as a tree of fields, with the preset's values where it gives none.

    Args:
        tree: the configuration.
        name: the preset.
        more: values that replace the preset's.
    """
    filled = dict(tree)
    for values in (more or {}, PRESETS[name]):
        for field, value in values.items():
            given = filled.get(field, {} if isinstance(value, Mapping) else value)
            filled[field] = {**value, **given} if isinstance(value, Mapping) and isinstance(given, Mapping) else given
    return filled
