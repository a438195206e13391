"""Passes through a network as CUDA graphs, so that a GPU need not wait for thousands of launches."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Pass = Callable[[Batch], Tensor]

log = logging.getLogger(__name__)

WARM_UP = 2
"""Passes before a capture, in which libraries make their plans."""
WORTH = 10
"""Number of steps from which on a capture pays."""


def captured(work: Pass, example: Batch, parameters: Sequence[nn.Parameter]) -> Pass:
    """Capture a forward and backward pass in a CUDA graph, whose replay does the same arithmetic.

    Args:
        work: adds the gradients of a batch's loss to the parameters' gradients, and returns the loss.
        example: a batch of the shape that will be passed.
        parameters: the parameters that train. Their gradients are cleared.

    Returns:
        A function like ``work``, which replaces the gradients instead of adding to them. A batch of another shape passes
        through ``work``, as do all batches if the pass cannot be captured.
    """
    given = tuple(tensor.clone() for tensor in example)

    def cleared_pass() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        return work(given)  # pyright: ignore[reportArgumentType]

    found = _graph_of(cleared_pass)
    if found is None:
        return work
    graph, loss = found
    gradients = [parameter.grad for parameter in parameters]

    def replay(batch: Batch) -> Tensor:
        if any(tensor.shape != place.shape for tensor, place in zip(batch, given, strict=True)):
            return work(batch)
        for place, tensor in zip(given, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss.clone()

    return replay


def captured_without_gradients(work: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture a pass without gradients, in which each of a batch's rows has a result of its own.

    Args:
        work: the pass.
        example: a batch. Later ones may have fewer rows, and pass as if they had as many.

    Returns:
        A function like ``work``.
    """
    given = example.clone()
    found = _graph_of(lambda: work(given))
    if found is None:
        return work
    graph, result = found

    def replay(batch: Tensor) -> Tensor:
        given[: len(batch)].copy_(batch)
        graph.replay()
        return result[: len(batch)].clone()

    return replay


def _graph_of(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
    """A graph and the tensor that each of its replays writes to. None if the pass cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    # A graph has memory of its own.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may prepare samples on the same GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
    except RuntimeError as error:
        log.warning("a pass cannot be captured as a CUDA graph, so it is launched piece by piece: %s", error)
        return None
    return graph, result
