"""What a run ran on."""

import platform
import sys
from importlib.metadata import version
from typing import Any

from flapsam import __version__

PACKAGES = ("torch", "transformers", "peft", "monai", "nibabel", "numpy", "safetensors", "zstandard")
"""Those whose versions can change a result."""


def environment() -> dict[str, Any]:
    """Versions, machine and command line, for whoever repeats the run."""
    return {
        "flapsam": __version__,
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "packages": {name: version(name) for name in PACKAGES},
    }
