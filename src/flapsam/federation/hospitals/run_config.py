"""The configuration of a run between hospitals."""

from collections.abc import Iterable
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config

FIXED = ("data.path=/", "modes=[federated]", "data.table=null", "data.simulated_sites=null")
"""Overrides for every run between hospitals: each site sets its own data paths, and the sites train one model together."""


def read_federated_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's configuration with ``read_config``, for a run between hospitals.

    Args:
        path: the configuration file.
        overrides: assignments such as ``rounds.count=5``.

    Raises:
        FlapsamError: the configuration is invalid.
    """
    config = read_config(path, [*overrides, *FIXED])
    if config.rounds.count == 0:
        raise FlapsamError(f"{path}: rounds.count is 0, so nothing trains; raise it, or use flapsam federation evaluate")
    if config.data.training_cases is not None:
        raise FlapsamError(
            f"{path}: data.training_cases works in simulations only; between hospitals, each site decides which of its "
            "cases are used. Remove it"
        )
    return config
