"""The configuration of a run between hospitals."""

from collections.abc import Iterable
from pathlib import Path

from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config

FIXED = ("data.path=/", "modes=[federated]", "data.table=null", "data.simulated_sites=null")
"""Each site says for itself where its data are, and a federation trains one model together."""


def read_federated_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """As ``read_config``, for a run between hospitals."""
    return read_config(path, [*overrides, *FIXED])
