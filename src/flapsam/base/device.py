"""The device that a network runs on, and the machine around it."""

import os
from typing import Any

import psutil
import torch

from flapsam.base.environment import environment
from flapsam.base.errors import FlapsamError


def find_device(name: str) -> torch.device:
    """The device called ``name``. ``auto`` takes a GPU if the machine has one.

    Raises:
        FlapsamError: the device is not available on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FlapsamError(f"device '{name}' is not available on this machine; use cpu, cuda, mps or auto") from error
    return device


def set_up_torch(threads: int, *, deterministic: bool) -> None:
    """Set, for the whole process, what the last bits of a result depend on.

    Args:
        threads: number of threads for each operation on the CPU.
        deterministic: whether to use only operations that return the same bits every time.
    """
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # flapsam writes every tensor before reading it. Filling memory first would cost a fifth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def inspect_machine() -> dict[str, Any]:
    """Versions, memory, disk and GPUs of this machine."""
    described = environment()
    del described["command"]
    return {
        **described,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "disk_free_gib": round(psutil.disk_usage(".").free / 2**30, 1),
        "device": str(find_device("auto")),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
