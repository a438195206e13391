import threading
import time
from collections.abc import Iterator

import pytest
import torch

from flapsam.base.prefetch import DEPTH, ahead


def test_the_items_come_in_their_order():
    assert list(ahead(iter(range(10)))) == list(range(10))
    assert list(ahead(iter(()))) == []


@pytest.mark.parametrize("depth", [1, DEPTH])
def test_they_are_made_in_another_thread_ahead_of_their_use(depth: int):
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield threading.get_ident()

    coming = ahead(items(), depth)
    assert next(coming) != threading.get_ident()
    deadline = time.monotonic() + 10
    while len(made) < depth + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == depth + 1
    next(coming)
    while len(made) < depth + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == depth + 2


def test_an_exception_is_raised_in_its_place():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="broken"):
        next(coming)


def test_the_network_keeps_its_threads():
    torch.set_num_threads(2)

    def items() -> Iterator[int]:
        yield torch.get_num_threads()

    assert list(ahead(items())) == [1]
    assert torch.get_num_threads() == 2
