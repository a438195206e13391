"""A site's configuration: where its data are and what it allows a run to do. No server can override it."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from flapsam.base.names import Name
from flapsam.run.config import Checkpoint, Positive, StrictModel
from flapsam.run.reading import read_options

PATHS = ("data.path", "data.table", "weights", "state")


class SiteData(StrictModel):
    """Where a site's volumes are."""

    path: Path
    """A folder with ``images`` and ``labels``, or with any layout that ``flapsam data list`` shows."""
    layout: str = "auto"
    """Layout of the folder, as in a run's ``data.layout``."""
    table: Path | None = None
    """CSV file with columns ``case`` and ``site``, and optionally ``split`` and ``subject``."""
    site: Name | None = None
    """This site's name in the data, if the data hold several sites and call it differently."""


class SiteConfig(StrictModel):
    """A site's configuration, as in ``site.yaml``."""

    data: SiteData
    """Where the site's volumes are."""
    state: Path = Path("state")
    """Folder for the state of runs, the unpacked volumes, the site's own log and its adapters."""
    strategies: list[str] | None = None
    """Strategies that this site accepts. All by default."""
    aggregators: list[str] | None = None
    """Aggregators that this site accepts. All by default."""
    max_rounds: Positive | None = None
    """Maximum number of rounds that this site accepts in a run."""
    min_cases: Positive = 1
    """Number of training cases below which the site takes part in no run. A model trained on few cases reveals too much
    about them."""
    metrics: bool = True
    """Whether losses, validation Dice, and the steps and times of training leave the site. The numbers of cases and slices
    always do."""
    weights: Checkpoint | None = None
    """Checkpoint of the backbone, if ``flapsam backbone get`` did not download it."""
    device: str = "cpu"
    """Device to train on: ``cpu``, ``cuda``, ``mps`` or ``auto``."""
    threads: Positive | None = None
    """Number of threads to train with. All cores by default."""
    free_memory_gib: Annotated[float, Field(ge=0)] = 2
    """Free memory in GiB below which ``flapsam federation check`` reports a problem."""

    @property
    def log(self) -> Path:
        """The site's own log. It never leaves the site."""
        return self.state / "site.log"

    @property
    def lock(self) -> Path:
        """File that the site's fit process keeps locked while it runs."""
        return self.state / "lock"

    def run_folder(self, run: str) -> Path:
        """Folder for the site's state of a run.

        Args:
            run: the run's id.
        """
        return self.state / "runs" / run


def read_site_config(path: Path) -> SiteConfig:
    """Read a site's configuration. Relative paths in it are relative to its own folder.

    Raises:
        FlapsamError: the configuration is invalid.
    """
    # Absolute, because an engine changes its working directory.
    path = path.absolute()
    config = read_options(path, SiteConfig, PATHS)
    return config.model_copy(update={"state": path.parent / config.state})
