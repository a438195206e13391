"""A run's folder: the names of its files, the run's id and its configuration."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flapsam.base.environment import environment
from flapsam.base.errors import FlapsamError, too_new
from flapsam.base.files import check_writable, write_text
from flapsam.run.config import RunConfig
from flapsam.run.ledger import Cohort
from flapsam.run.presets import PRESETS
from flapsam.run.reading import changed, read_config, write_config

FOLDER_FORMAT = 2
"""Format of a run's folder: its files, the ledger's events, and the state that a run resumes from."""


@dataclass(frozen=True)
class RunFolder:
    """The files in a run's folder. No other module names them."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's configuration, with every field written out."""
        return self.path / "run.yaml"

    @property
    def environment(self) -> Path:
        """The run's id, and the machine and the versions that it ran on."""
        return self.path / "environment.json"

    @property
    def ledger(self) -> Path:
        """The ledger, one event per line."""
        return self.path / "events.jsonl"

    @property
    def results(self) -> Path:
        """Test scores and traffic of a simulation."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The report of the run, as a page."""
        return self.path / "report" / "index.html"

    @property
    def cache(self) -> Path:
        """Unpacked volumes of a simulation, which are removed when the run is complete."""
        return self.path / "cache"

    @property
    def state(self) -> Path:
        """The state that ``--resume`` reads."""
        return self.path / "state"

    @property
    def lock(self) -> Path:
        """The file that a process locks while it works on the run."""
        return self.state / "lock"

    @property
    def joined(self) -> Path:
        """Between hospitals: the amount of training data that each site reported when it first took part."""
        return self.state / "sites.json"

    @property
    def arrivals(self) -> Path:
        """Between hospitals: answers that the server has not read yet."""
        return self.state / "arrived"

    @property
    def predictions(self) -> Path:
        """Label maps of a simulation's test cases."""
        return self.path / "predictions"

    def server_state(self, cohort: Cohort) -> Path:
        """The server's state for a cohort."""
        return self.state / str(cohort) / "server"

    def client_states(self, cohort: Cohort) -> Path:
        """The clients' state for a cohort of a simulation, with one folder per site."""
        return self.state / str(cohort) / "sites"

    def adapter(self, cohort: Cohort) -> Path:
        """The folder of a cohort's adapter."""
        name = "adapter" if cohort.mode == "federated" else f"adapter-{cohort.mode}"
        return self.path / name / (cohort.site or "")

    def label_map(self, mode: str, site: str, case: str) -> Path:
        """The label map that a mode's model predicts for a test case."""
        return self.predictions / mode / site / f"{case}.nii.gz"

    def tracker(self, name: str) -> Path:
        """The folder that a tracker writes to."""
        return self.path / "tracking" / name

    @property
    def is_begun(self) -> bool:
        """Whether the folder holds a run."""
        return self.environment.exists()

    def begin(self, config: RunConfig, device: Mapping[str, Any] | None = None) -> str:
        """Begin a run in this folder, and return its id.

        Args:
            config: the run's configuration.
            device: what ``describe_device`` says of the device that computes here; None where nothing is computed.

        Raises:
            FlapsamError: the folder cannot be written to.
        """
        check_writable(self.path)
        write_text(self.config, write_config(config))
        run = uuid.uuid4().hex
        metadata = {"format": FOLDER_FORMAT, "run": run, **environment(), **(device or {})}
        write_text(self.environment, json.dumps(metadata, indent=2) + "\n")
        return run

    def read_environment(self) -> dict[str, Any]:
        """Read the id of the run in the folder (key ``run``), and the machine and the versions that it ran on.

        Raises:
            FlapsamError: the folder holds no run, the file cannot be read, or a later version wrote it.
        """
        path = self.environment
        try:
            stored = json.loads(path.read_text())
            # The first folders had no format, but they always had the run's id.
            metadata = {"format": 1, **stored, "run": stored["run"]}
        except FileNotFoundError as error:
            raise FlapsamError(
                f"{self.path}: there is no run here; give a folder that flapsam simulate or flapsam federation run wrote"
            ) from error
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise FlapsamError(f"{path}: cannot read the id of the run; restore this file or start a new run") from error
        if problem := too_new(metadata["format"], FOLDER_FORMAT):
            raise FlapsamError(f"{path}: {problem}")
        return metadata

    def read_config(self) -> RunConfig:
        """Read the configuration of the run in the folder.

        Raises:
            FlapsamError: as for ``read_environment``, or the configuration is wrong.
        """
        config = read_config(self.config)
        if self.read_environment()["format"] == 1 and config.backbone.name == "sam-tiny":
            # In format 1, sam-tiny was the network that is now called sam-tiny-1.
            return changed(config, {"backbone.name": "sam-tiny-1"})
        return config

    def resume(self, config: RunConfig) -> str:
        """Check that the run in the folder has this configuration, and return its id.

        Raises:
            FlapsamError: the run has another configuration, or a later version wrote it.
        """
        run, stored = self.read_environment()["run"], self.read_config()
        if (stored.backbone.name, config.backbone.name) == ("sam-tiny-1", "sam-tiny"):
            raise FlapsamError(
                f"{self.config}: the run here was begun with the backbone that is now called sam-tiny-1; add "
                "--set backbone.name=sam-tiny-1 to resume it"
            )
        if stored.lora.projections == ["q", "v"] and config.lora.projections == PRESETS["fast"]["lora"]["projections"]:
            raise FlapsamError(
                f"{self.config}: the run here was begun with adapters on queries and values alone, as preset fast had them "
                "before; add --set 'lora.projections=[q, v]' to resume it"
            )
        # Whom a run waits for may change, because a site may leave for good.
        same = changed(stored, {"rounds.require": config.rounds.require})
        # The texts may differ, because a later version writes fields that an earlier one did not know.
        if write_config(same) != write_config(config):
            raise FlapsamError(f"{self.config}: the run here has another configuration; resume it with that one")
        if stored.rounds.require != config.rounds.require:
            write_text(self.config, write_config(config))
        return run
