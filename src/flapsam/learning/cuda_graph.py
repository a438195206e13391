"""Passes through a network as CUDA graphs, so that a GPU need not wait for thousands of launches."""

import logging
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Pass = Callable[[Batch], Tensor]

log = logging.getLogger(__name__)

WARM_UP = 2
"""Passes before a capture, in which libraries make their plans."""
WORTH = 10
"""Number of steps from which on a capture pays."""
_alone = Lock()
"""A process captures one graph at a time."""


def captured(work: Pass, examples: Sequence[Batch], parameters: Sequence[nn.Parameter]) -> Pass:
    """Capture a forward and backward pass in CUDA graphs, whose replay does the same arithmetic.

    Args:
        work: adds the gradients of a batch's loss to the parameters' gradients, and returns the loss.
        examples: a batch of each shape that will be passed, the largest first.
        parameters: the parameters that train. Their gradients are cleared.

    Returns:
        A function like ``work``, which replaces the gradients instead of adding to them. A batch whose pass could not be
        captured passes through ``work``.
    """
    graphs: dict[torch.Size, tuple[Batch, torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]] = {}
    pool: Any = None

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    for images, labels in examples:
        given = images.clone(), labels.clone()

        def cleared_pass(given: Batch = given) -> Tensor:
            clear()
            return work(given)

        found = _graph_of(cleared_pass, images.device, clear, pool)
        if found is None:
            break
        graph, loss = found
        # The graphs are replayed one after another, so that they may use the same memory.
        pool = graph.pool()
        graphs[images.shape] = given, graph, loss, [parameter.grad for parameter in parameters]
    clear()

    def replay(batch: Batch) -> Tensor:
        if batch[0].shape not in graphs:
            return work(batch)
        given, graph, loss, gradients = graphs[batch[0].shape]
        for place, tensor in zip(given, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss.clone()

    return replay if graphs else work


def captured_without_gradients(work: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Capture a pass without gradients, in which each of a batch's rows has a result of its own.

    Args:
        work: the pass.
        example: a batch. Later ones may have fewer rows, and pass as if they had as many.

    Returns:
        A function like ``work``, which several threads may call; None if the pass cannot be captured.
    """
    given = example.clone()
    found = _graph_of(lambda: work(given), example.device)
    if found is None:
        return None
    graph, result = found
    turn = Lock()

    def replay(batch: Tensor) -> Tensor:
        with turn:
            given[: len(batch)].copy_(batch)
            graph.replay()
            return result[: len(batch)].clone()

    return replay


def _graph_of(
    work: Callable[[], Tensor], device: torch.device, clear: Callable[[], None] = lambda: None, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
    """A graph and the tensor that each of its replays writes to. None if the pass cannot be captured.

    Args:
        work: the pass, which reads the same memory every time.
        device: the GPU of all its tensors.
        clear: frees what a pass leaves.
        pool: memory of another graph that this one may use, too.
    """
    with _alone, torch.cuda.device(device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    expected = work().clone()
                clear()
            here.wait_stream(side)
            # A graph has memory of its own.
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            # Other threads may prepare samples on the same GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                result = work()
            graph.replay()
            if not torch.allclose(result, expected, rtol=0.05, atol=0.05, equal_nan=True):
                raise RuntimeError("its replay does not give what it gave before")
        except RuntimeError as error:
            torch.cuda.set_stream(here)
            log.warning("a pass cannot be captured as a CUDA graph, so it is launched piece by piece: %s", error)
            return None
        return graph, result
