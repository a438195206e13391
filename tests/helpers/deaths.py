"""What can happen in a process that reads an image. The process imports this module, so it imports little itself."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from flapsam.volumes.opened import Opened


def die(image: str) -> Opened:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def die_while_reading(image: str) -> Opened:
    def parts() -> Iterator[NDArray]:
        yield np.zeros((2, 2, 1))
        os.kill(os.getpid(), signal.SIGSEGV)

    return Opened((2, 2, 2), np.dtype(np.float32), np.eye(4), parts)


def hang(image: str) -> Opened:
    time.sleep(60)
    raise AssertionError


def compute(image: str) -> Opened:
    while True:
        pass


def swell(image: str) -> Opened:
    return Opened((len(bytes(2**30)), 1, 1), np.dtype(np.uint8), np.eye(4), lambda: iter(()))


def fail(image: str) -> Opened:
    raise KeyError("first line\nsecond line" + "x" * 5000)


def fall_short(image: str) -> Opened:
    return Opened((2, 2, 2), np.dtype(np.float32), np.eye(4), lambda: iter([np.zeros((2, 2, 1))]))


def process_id(image: str) -> int:
    return os.getpid()
