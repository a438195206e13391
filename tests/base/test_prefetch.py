import threading
import time
from collections.abc import Iterator

import pytest
import torch

from flapsam.base.prefetch import DEPTH, ahead


def test_items_keep_their_order():
    assert list(ahead(iter(range(10)))) == list(range(10))
    assert list(ahead(iter(()))) == []


@pytest.mark.parametrize("depth", [1, DEPTH])
def test_items_are_computed_ahead_in_another_thread(depth: int):
    computed: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            computed.append(number)
            yield threading.get_ident()

    prefetched = ahead(items(), depth)
    assert next(prefetched) != threading.get_ident()
    deadline = time.monotonic() + 10
    while len(computed) < depth + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(computed) == depth + 1
    next(prefetched)
    while len(computed) < depth + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(computed) == depth + 2


def test_an_exception_is_raised_in_place_of_its_item():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    prefetched = ahead(items())
    assert next(prefetched) == 1
    with pytest.raises(ValueError, match="broken"):
        next(prefetched)


def test_prefetching_uses_one_torch_thread_and_the_caller_keeps_its_own():
    torch.set_num_threads(2)

    def items() -> Iterator[int]:
        yield torch.get_num_threads()

    assert list(ahead(items())) == [1]
    assert torch.get_num_threads() == 2
