"""Codecs, which turn tensors into few bytes, and their registry."""

from collections.abc import Callable

import torch

from flapsam.base.errors import choose
from flapsam.federation.compression.codec import Codec
from flapsam.federation.compression.topk import TopK
from flapsam.federation.compression.values import Dense, Floats, Integers, Steps, Values
from flapsam.run.config import Compression

VALUES: dict[str, Callable[[Compression], Values]] = {
    "fp32": lambda options: Floats(torch.float32),
    "bf16": lambda options: Floats(torch.bfloat16),
    "int8": lambda options: Integers(8),
    "int4": lambda options: Integers(4),
    "steps": lambda options: Steps(options.bits),
}
"""Name → function from a run's options to a way of writing numbers."""


def _topk(name: str) -> Callable[[Compression], Codec]:
    return lambda options: TopK(VALUES[name](options), options.density)


def _dense(name: str) -> Callable[[Compression], Codec]:
    return lambda options: Dense(VALUES[name](options))


CODECS: dict[str, Callable[[Compression], Codec]] = {
    **{name: _dense(name) for name in VALUES},
    "topk": _topk("fp32"),
    **{f"topk-{name}": _topk(name) for name in ("bf16", "int8", "int4")},
}
"""Name → function from a run's options to a codec. Add new ways of writing numbers to ``VALUES``, other codecs here."""

__all__ = ["CODECS", "Codec", "codec"]


def codec(options: Compression) -> Codec:
    """The codec that the options name.

    Raises:
        FlapsamError: the name is unknown.
    """
    return choose("compression.codec", options.codec, CODECS)(options)
