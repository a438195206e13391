"""Sets of values for a run's fields, by name: ``preset: fast`` in a configuration takes them where it says nothing itself.

``paper`` is arXiv 2407.21739 and its published code: the defaults of the fields themselves. ``fast`` is what was measured to
reach the same Dice in the least time; ``benchmarks/results/training.md`` says what each value gave.
"""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "fast": {
        "samples": {"channels": "adjacent"},
        "backbone": {"masks": "warm"},
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
    },
}
"""Preset → field, or group of fields → field → value."""


def with_preset(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration's tree with a preset's values where the tree has none."""
    filled = dict(tree)
    for field, value in PRESETS[name].items():
        given = tree.get(field, {} if isinstance(value, Mapping) else value)
        filled[field] = {**value, **given} if isinstance(value, Mapping) and isinstance(given, Mapping) else given
    return filled
