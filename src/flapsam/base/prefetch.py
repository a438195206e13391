"""Work done ahead of time, in a thread of its own, so that the network need not wait for its samples."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")

DEPTH = 3
"""Items that may be ready and waiting, unless it is said otherwise."""


def ahead(items: Iterator[Item], depth: int = DEPTH) -> Generator[Item]:
    """The same items in the same order, each computed while the ones before it are in use.

    At most ``depth`` are ready and waiting. An exception of the iterator is raised where its item would have come.
    """
    end = object()
    with ThreadPoolExecutor(1, initializer=_one_thread) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # pyright: ignore[reportReturnType]


def _one_thread() -> None:
    """Leave the other cores to the network: two teams of threads slow each other down."""
    torch.get_num_threads()  # PyTorch sets a thread's number at its first use, and would undo the limit later
    threadpool_limits(1, user_api="openmp")
