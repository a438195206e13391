"""What the server does with the clients' mean: take it as it is, or treat the step towards it as a gradient.

The adaptive optimizers are algorithm 2 of Reddi et al. 2021 (Adaptive Federated Optimization, arXiv 2003.00295). FedAvgM is
Hsu et al. 2019 (arXiv 1909.06335). With θ the global tensor and Δ the clients' mean minus θ: m ← β₁·m + (1 − β₁)·Δ,
θ ← θ + η·m / (√v + τ).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flapsam.base.errors import choose
from flapsam.run.config import ServerOptions

Moments = dict[str, dict[str, Tensor]]
"""``m`` and ``v``, each by tensor name. Empty before the first round."""


def _fedavgm(old: Tensor, change: Tensor, state: dict[str, Tensor], options: ServerOptions) -> Tensor:
    state["m"] = options.momentum * state["m"] + change
    return old + (options.learning_rate or 1.0) * state["m"]


def _adaptive(old: Tensor, change: Tensor, state: dict[str, Tensor], options: ServerOptions) -> Tensor:
    state["m"] = options.momentum * state["m"] + (1 - options.momentum) * change
    return old + (options.learning_rate or 0.01) * state["m"] / (state["v"].sqrt() + options.floor)


def _fedadam(old: Tensor, change: Tensor, state: dict[str, Tensor], options: ServerOptions) -> Tensor:
    state["v"] = options.second_moment * state["v"] + (1 - options.second_moment) * change**2
    return _adaptive(old, change, state, options)


def _fedyogi(old: Tensor, change: Tensor, state: dict[str, Tensor], options: ServerOptions) -> Tensor:
    squares = change**2
    state["v"] = state["v"] - (1 - options.second_moment) * squares * torch.sign(state["v"] - squares)
    return _adaptive(old, change, state, options)


SERVER_OPTIMIZERS: dict[str, Callable[[Tensor, Tensor, dict[str, Tensor], ServerOptions], Tensor] | None] = {
    "none": None,
    "fedavgm": _fedavgm,
    "fedadam": _fedadam,
    "fedyogi": _fedyogi,
}
"""Name → function that takes a step with one tensor and changes its moments in place. ``none`` has no function."""


def server_step(
    old: Mapping[str, Tensor], mean: Mapping[str, Tensor], moments: Moments, options: ServerOptions
) -> tuple[dict[str, Tensor], Moments]:
    """Take the server's step of a round.

    Args:
        old: the global tensors before the round.
        mean: the aggregated tensors of the clients.
        moments: the moments after the round before.
        options: the optimizer and its settings.

    Returns:
        The global tensors and the moments after the round.

    Raises:
        FlapsamError: the optimizer's name is unknown.
    """
    step = choose("server.optimizer", options.optimizer, SERVER_OPTIMIZERS)
    if step is None:
        return dict(mean), {}
    result, kept = {}, {"m": {}, "v": {}}
    for name, target in mean.items():
        state = {kind: moments.get(kind, {}).get(name, torch.zeros_like(target)) for kind in kept}
        result[name] = step(old[name], target - old[name], state, options)
        for kind in kept:
            kept[kind][name] = state[kind]
    return result, kept
