"""A site's configuration: where its data are and what it allows a run to do. No server can override it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from flapsam.base.names import Name, Named
from flapsam.federation.privacy.budget import Ceiling
from flapsam.run.config import LEAST_SECURE, Checkpoint, Fraction, Positive, StrictModel
from flapsam.run.reading import read_options

SAFE_STRATEGIES = ("flap", "lora", "lora-decoder", "decoder", "partial-decoder")
"""Strategies that a site accepts by default."""
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
    test_fraction: Fraction = 0.2
    """Share of the subjects that are held out for testing, if the data have no split of their own. The site's first run
    fixes the split; no run can change it."""
    validation_fraction: Fraction = 0.15
    """Share of the training subjects that are held out for validation, if the split has no ``val``."""
    split_seed: int = 0
    """Seed by which the split is drawn. With the run's seed and fractions, it is the split of ``flapsam simulate``."""


class Bounds(StrictModel):
    """What a run may ask of a site's training. The defaults suit sound runs.

    Outside of them, a single answer can reveal a training slice: with one step on one slice, with moments that Adam does not
    average, or with a loss so small that Adam's step is the gradient itself.
    """

    min_steps: Positive = 8
    """Minimum number of training steps of a fit. A step counts by its learning rate as a share of the fit's highest one."""
    max_epochs: Positive = 100
    """Maximum number of local epochs in a round."""
    max_steps: Positive = 10_000
    """Maximum number of steps in a round, if the run gives one."""
    max_batch_size: Positive = 256
    """Maximum number of windows in a batch."""
    max_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Maximum learning rate."""
    max_weight_decay: Annotated[float, Field(ge=0)] = 1
    """Maximum weight decay."""
    min_betas: tuple[float, float] = (0.5, 0.9)
    """Minimum decay rates β₁ and β₂ of AdamW's moments. Both must be below 1."""
    loss_weights: tuple[float, float] = (0.1, 10)
    """Range of the sum of the weights of cross-entropy and Dice, and of the weight of the foreground."""
    max_proximal: Annotated[float, Field(ge=0)] = 10
    """Maximum μ of FedProx."""
    min_sampling: Fraction = 0.05
    """Minimum probability with which a patient takes part in a step of a private run."""
    max_rank: Positive = 64
    """Maximum rank of the adapters."""
    max_size: Positive = 1024
    """Maximum side of the network's input in pixels."""
    max_classes: Positive = 32
    """Maximum number of classes."""


class SecurePartners(StrictModel):
    """The sites with which this one takes part in secure aggregation."""

    partners: Annotated[Named[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]], Field(min_length=LEAST_SECURE - 1)]
    """Other site → its public key, as ``flapsam federation key`` shows it there. Ask that site for it, not the server."""

    @field_validator("partners")
    @classmethod
    def _distinct(cls, value: dict[str, str]) -> dict[str, str]:
        if len(set(value.values())) < len(value):
            raise ValueError("two partners have the same key")
        return value

    min_sites: Annotated[int, Field(ge=LEAST_SECURE)] | None = None
    """Least number of sites, this one included, in a sum that this site takes part in. By default, more than two thirds of
    this site and its partners, and at least three."""
    required: bool = True
    """Whether runs without secure aggregation are refused."""


class SiteConfig(StrictModel):
    """A site's configuration, as in ``site.yaml``."""

    data: SiteData
    """Where the site's volumes are."""
    state: Path = Path("state")
    """Folder for the state of runs, the unpacked volumes, the site's own log and its adapters."""
    strategies: Sequence[str] = SAFE_STRATEGIES
    """Strategies that this site accepts. By default those that train neither the patch nor the position embeddings, whose
    gradients reveal the images."""
    aggregators: list[str] | None = None
    """Aggregators that this site accepts. All by default."""
    max_rounds: Positive | None = None
    """Maximum number of rounds that this site answers, counted over all runs in its state."""
    min_cases: Positive = 1
    """Number of cases that a fit must train on. Below it, the site takes part in no run. A model trained on few cases
    reveals too much about them."""
    min_validation_cases: Positive = 1
    """Number of validation cases below which no Dice leaves the site."""
    min_test_patients: Positive = 5
    """Number of patients below which no test score leaves the site, for a class as for all together."""
    max_tests: Positive = 100
    """Maximum number of times that test scores leave the site, counted over all runs in its state."""
    privacy: Ceiling | None = None
    """The most that may be revealed about a patient. Runs without differential privacy are refused if it is given."""
    secure: SecurePartners | None = None
    """The partners in secure aggregation. Without it, runs with secure aggregation are refused."""
    bounds: Bounds = Bounds()
    """What a run may ask of the site's training."""
    metrics: bool = True
    """Whether losses, validation Dice, test scores, and the steps and times of training leave the site. The rounded numbers
    of cases and slices do so in any case, unless the run is private."""
    weights: Checkpoint | None = None
    """Checkpoint of the backbone, if ``flapsam backbone get`` did not download it."""
    device: str = "cpu"
    """Device to train on: ``cpu``, ``cuda``, ``mps`` or ``auto``."""
    threads: Positive | None = None
    """Number of threads to train with. All cores by default."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory in GiB that training may take, enforced by the operating system on Linux with ``device: cpu``. All of the
    machine's memory by default."""
    free_memory_gib: Annotated[float, Field(ge=0)] = 2
    """Free memory in GiB below which ``flapsam federation check`` reports a problem."""

    @property
    def log(self) -> Path:
        """The site's own log. It never leaves the site."""
        return self.state / "site.log"

    @property
    def journal(self) -> Path:
        """The site's own record of what runs asked of it and what left."""
        return self.state / "journal.jsonl"

    @property
    def privacy_spent(self) -> Path:
        """The ledger of the privacy that this site's answers have spent."""
        return self.state / "privacy.jsonl"

    @property
    def identity(self) -> Path:
        """The site's own key, with which it signs in secure aggregation."""
        return self.state / "identity.key"

    @property
    def split(self) -> Path:
        """The split that the site's first run has fixed."""
        return self.state / "split.json"

    @property
    def tested(self) -> Path:
        """The cases that the site has scored for others, and their label values."""
        return self.state / "test_cases.json"

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
