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
    config = as_federated(read_config(path, [*overrides, *FIXED]), str(path))
    if config.rounds.count == 0:
        raise FlapsamError(f"{path}: rounds.count is 0, so nothing trains; raise it, or use flapsam federation evaluate")
    return config


def as_federated(config: RunConfig, name: str) -> RunConfig:
    """Check that a configuration suits a run between hospitals, and fix what each site sets for itself.

    Args:
        config: the configuration.
        name: what to call it in errors.

    Raises:
        FlapsamError: it asks for what only a simulation can do.
    """
    data = {"path": Path("/"), "table": None, "simulated_sites": None}
    config = config.model_copy(update={"modes": ["federated"], "data": config.data.model_copy(update=data)})
    if config.data.training_cases is not None:
        raise FlapsamError(
            f"{name}: data.training_cases works in simulations only; between hospitals, each site decides which of its "
            "cases are used. Remove it"
        )
    return config
