"""The device that a network runs on, and the machine around it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from flapsam.base.environment import environment
from flapsam.base.errors import FlapsamError

DRIVER = Path("/proc/driver/nvidia/version")
"""Where Linux says which driver of NVIDIA it has loaded."""


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


def set_up_torch(threads: int, *, deterministic: bool, precision: str = "fp32") -> None:
    """Set, for the whole process, what the last bits of a result depend on.

    Args:
        threads: number of threads for each operation on the CPU.
        deterministic: whether to use only operations that return the same bits every time.
        precision: with ``tf32``, a GPU may round the factors of products and convolutions of float32 to ten bits.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    # cuDNN's attention has no gradient for a bias, and is not deterministic.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # flapsam writes every tensor before reading it. Filling memory first would cost a fifth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Work on a GPU beside what else it does: on a stream that nobody else uses meanwhile, whose work is done at the end."""
    if device.type != "cuda":
        yield
        return
    try:
        stream = _streams.setdefault(device, []).pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
    _streams[device].append(stream)


def lent(tensor: Tensor) -> Tensor:
    """Return a tensor that was made ``beside`` other work, whose memory now stays until that work is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.default_stream(tensor.device))
    return tensor


_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams of each GPU that wait for work. PyTorch keeps memory for every stream, so they are used again."""


def sample_device(device: torch.device) -> torch.device:
    """The device on which samples are made for a network: its own if that can do several things at once, or the CPU."""
    # Two threads that use MPS at the same time crash.
    return device if device.type == "cuda" else torch.device("cpu")


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


def device_of_worker(name: str, number: int) -> str:
    """The device of a worker process: the machine's GPUs in turn, if the run's device names none of them in particular."""
    count = torch.cuda.device_count() if name == "cuda" else 1
    return f"cuda:{number % count}" if count > 1 else name


def on_one_device(name: str, workers: int) -> int:
    """Largest number of workers on one device."""
    return sum(device_of_worker(name, number) == device_of_worker(name, 0) for number in range(max(workers, 1)))


def describe_device(name: str) -> dict[str, Any]:
    """What a run's environment says about its device: the model of a GPU, its memory, and the software that drives it."""
    device = torch.device(name)
    if device.type != "cuda":
        return {"device": name}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": name,
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Version of the GPU's driver, where the system says it."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None
