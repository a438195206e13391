"""Preparing samples ahead of time in separate threads, so that the network need not wait for them."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, repeat
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")

DEPTH = 3
"""Default for the number of items that each thread may compute in advance."""


def ahead(items: Iterator[Item], depth: int = DEPTH) -> Generator[Item]:
    """Yield the same items in the same order, each computed while earlier ones are in use.

    At most ``depth`` items are computed in advance. An exception of the iterator is raised in place of its item.
    """
    end = object()
    for item in called_ahead(repeat(partial(next, items, end)), depth=depth):
        if item is end:
            return
        yield item  # pyright: ignore[reportReturnType]


def called_ahead(calls: Iterable[Callable[[], Item]], threads: int = 1, depth: int = DEPTH) -> Generator[Item]:
    """Yield what the calls return, in their order, while threads make the following calls.

    At most ``depth`` calls for each thread are made in advance. An exception of a call is raised in place of its item.
    """
    remaining = iter(calls)
    with ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        waiting = deque(pool.submit(call) for call in islice(remaining, depth * threads))
        while waiting:
            item = waiting.popleft().result()
            waiting.extend(pool.submit(call) for call in islice(remaining, 1))
            yield item


def _one_thread() -> None:
    """Leave the other cores to the network, because two teams of threads slow each other down."""
    # PyTorch sets the number of threads at its first use and would otherwise undo the limit later.
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
