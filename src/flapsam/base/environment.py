"""The software, machine and command line that a run used."""

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flapsam.base.version import __version__

PACKAGES = ("torch", "transformers", "peft", "monai", "nibabel", "numpy", "safetensors", "zstandard")
"""Packages whose versions can change a result."""


def environment() -> dict[str, Any]:
    """Versions, machine and command line, so that the run can be repeated."""
    return {
        "flapsam": __version__,
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": default_threads(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def default_threads() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PROCESS = Path("/proc/self")


def forget_peak() -> None:
    """Reset the peak that ``peak_bytes`` reports, where the system allows it."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Peak resident memory of this process, or None where the system does not report it."""
    if not PROCESS.exists():
        return None
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
