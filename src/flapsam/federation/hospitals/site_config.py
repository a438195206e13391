"""A site's own file: its data, and what it lets a run do. No server can override it."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from flapsam.run.config import Checkpoint, Positive, StrictModel
from flapsam.run.reading import read_options

PATHS = ("data.path", "data.table", "weights", "state")


class SiteData(StrictModel):
    """Where a site's volumes are."""

    path: Path
    """A folder with ``images`` and ``labels``, or any layout of ``flapsam data list``."""
    layout: str = "auto"
    """As a run's ``data.layout``."""
    table: Path | None = None
    """A CSV with columns ``case,site`` and, if wanted, ``split`` and ``subject``."""
    site: str | None = None
    """This site's name in the data, if it has another there and they hold several."""


class SiteConfig(StrictModel):
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
    weights: Checkpoint | None = None
    """The backbone's checkpoint, if it is not where ``flapsam backbone get`` puts it."""
    device: str = "cpu"
    """Of a fit."""
    threads: Positive | None = None
    """A fit; all cores if not given."""
    free_memory_gib: Annotated[float, Field(ge=0)] = 2
    """Below this, ``flapsam federation check`` warns."""

    @property
    def log(self) -> Path:
        """The site's own log. It never leaves the site."""
        return self.state / "site.log"

    @property
    def lock(self) -> Path:
        """A file that the site's fitting process holds locked."""
        return self.state / "lock"

    def run_folder(self, run: str) -> Path:
        """What the site keeps of a run."""
        return self.state / "runs" / run


def read_site_config(path: Path) -> SiteConfig:
    """Read a site's file. Relative paths in it are relative to its own folder.

    Raises:
        FlapsamError: as ``read_options``.
    """
    # Absolute, because an engine works in a folder of its own.
    path = path.absolute()
    file = read_options(path, SiteConfig, PATHS)
    return file.model_copy(update={"state": path.parent / file.state})
