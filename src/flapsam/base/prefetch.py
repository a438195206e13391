"""Preparing samples ahead of time in a separate thread, so that the network need not wait for them."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")

DEPTH = 3
"""Default for the number of items that may be computed in advance."""


def ahead(items: Iterator[Item], depth: int = DEPTH) -> Generator[Item]:
    """Yield the same items in the same order, each computed while earlier ones are in use.

    At most ``depth`` items are computed in advance. An exception of the iterator is raised in place of its item.
    """
    end = object()
    with ThreadPoolExecutor(1, initializer=_one_thread) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # pyright: ignore[reportReturnType]


def _one_thread() -> None:
    """Leave the other cores to the network, because two teams of threads slow each other down."""
    # PyTorch sets the number of threads at its first use and would otherwise undo the limit later.
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
