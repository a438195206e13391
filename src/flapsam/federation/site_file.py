"""A site's own file: its data, and what it lets a run do. No server can override it."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from flapsam.config import Options, Positive, Weights, read_options

PATHS = ("data.path", "data.table", "weights", "state")


class SiteData(Options):
    """Where a site's volumes are."""

    path: Path
    """A folder with ``images`` and ``labels``, or any layout of ``flapsam data list``."""
    layout: str = "auto"
    """As a run's ``data.layout``."""
    table: Path | None = None
    """A CSV with columns ``case,site`` and, if wanted, ``split`` and ``subject``."""
    site: str | None = None
    """This site's name in the data, if it has another there and they hold several."""


class SiteFile(Options):
    """What a site says of itself, as in ``site.yaml``."""

    data: SiteData
    """Where its volumes are."""
    state: Path = Path("state")
    """Folder for what a run must not forget, unpacked volumes, the site's own log and its adapters."""
    strategies: list[str] | None = None
    """Those that this site takes part in; all if not given."""
    aggregators: list[str] | None = None
    """The same of aggregators."""
    max_rounds: Positive | None = None
    """The largest number of rounds of a run."""
    min_cases: Positive = 1
    """Training cases below which the site takes part in nothing, because a model of few shows too much of each."""
    metrics: bool = True
    """Whether losses and validation Dice leave the site; counts of cases and slices must."""
    weights: Weights | None = None
    """The backbone's checkpoint, if it is not where ``flapsam backbone get`` puts it."""
    device: str = "cpu"
    """Of a fit."""
    threads: Positive | None = None
    """A fit; all cores if not given."""
    free_memory_gib: Annotated[float, Field(ge=0)] = 2
    """Below this, ``flapsam federation check`` warns."""


def read_site_file(path: Path) -> SiteFile:
    """Read a site's file. Relative paths in it are relative to its own folder.

    Raises:
        FlapsamError: as ``config.read_options``.
    """
    # Absolute, because an engine works in a folder of its own.
    path = path.absolute()
    file = read_options(path, SiteFile, PATHS)
    return file.model_copy(update={"state": path.parent / file.state})
