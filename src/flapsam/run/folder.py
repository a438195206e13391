"""A run's folder: the names of its files, which run it holds, and what that run was asked to do."""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flapsam.base.environment import environment
from flapsam.base.errors import FlapsamError, too_new
from flapsam.base.files import check_writable, write_text
from flapsam.run.config import RunConfig
from flapsam.run.ledger import Cohort
from flapsam.run.reading import read_config, write_config

FOLDER_FORMAT = 1
"""Number of the format of a run's folder: its files, the ledger's events, and the state that a run is resumed from."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what. No other module names these files."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's configuration, every field spelled out."""
        return self.path / "run.yaml"

    @property
    def environment(self) -> Path:
        """The run's id, and the machine and versions that it ran on."""
        return self.path / "environment.json"

    @property
    def ledger(self) -> Path:
        """What happened, an event a line."""
        return self.path / "events.jsonl"

    @property
    def results(self) -> Path:
        """A simulation's test scores and traffic."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The run's page."""
        return self.path / "report" / "index.html"

    @property
    def cache(self) -> Path:
        """A simulation's unpacked volumes. They are removed when the run is complete."""
        return self.path / "cache"

    @property
    def state(self) -> Path:
        """What ``--resume`` reads."""
        return self.path / "state"

    @property
    def lock(self) -> Path:
        """A file that the process at work on the run holds locked."""
        return self.state / "lock"

    @property
    def joined(self) -> Path:
        """Between hospitals: what each site brought when it first took part."""
        return self.state / "sites.json"

    @property
    def arrivals(self) -> Path:
        """Between hospitals: answers that wait to be read."""
        return self.state / "arrived"

    @property
    def predictions(self) -> Path:
        """Label maps of a simulation's test cases."""
        return self.path / "predictions"

    def server_state(self, cohort: Cohort) -> Path:
        """The server's part of a cohort's state."""
        return self.state / str(cohort) / "server"

    def client_states(self, cohort: Cohort) -> Path:
        """The clients' part of a cohort's state in a simulation, a folder a site."""
        return self.state / str(cohort) / "sites"

    def adapter(self, cohort: Cohort) -> Path:
        """The folder of a cohort's adapter."""
        name = "adapter" if cohort.mode == "federated" else f"adapter-{cohort.mode}"
        return self.path / name / (cohort.site or "")

    def label_map(self, mode: str, site: str, case: str) -> Path:
        """The label map of a test case, as a mode's model predicts it."""
        return self.predictions / mode / site / f"{case}.nii.gz"

    def tracker(self, name: str) -> Path:
        """What a tracker writes."""
        return self.path / "tracking" / name

    @property
    def is_begun(self) -> bool:
        """Whether there is a run in the folder."""
        return self.environment.exists()

    def begin(self, config: RunConfig) -> str:
        """Begin a run in this folder and return its id.

        Raises:
            FlapsamError: the folder cannot be written.
        """
        check_writable(self.path)
        write_text(self.config, write_config(config))
        run = uuid.uuid4().hex
        written = {"format": FOLDER_FORMAT, "run": run, **environment()}
        write_text(self.environment, json.dumps(written, indent=2) + "\n")
        return run

    def read_environment(self) -> dict[str, Any]:
        """Which run is in the folder (``run``), and what it ran on.

        Raises:
            FlapsamError: there is no run, the file cannot be read, or a later version has written it.
        """
        path = self.environment
        try:
            written = json.loads(path.read_text())
            # At first folders had no format, but always the run's id.
            found = {"format": 1, **written, "run": written["run"]}
        except FileNotFoundError as error:
            raise FlapsamError(
                f"{self.path}: there is no run here; give a folder that flapsam simulate or federation run has written"
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FlapsamError(f"{path}: cannot be read, so it is unclear which run this is") from error
        if problem := too_new(found["format"], FOLDER_FORMAT):
            raise FlapsamError(f"{path}: {problem}")
        return found

    def resume(self, config: RunConfig) -> str:
        """The id of the run in the folder, which must have this configuration.

        Raises:
            FlapsamError: the run has another configuration, or a later version has written it.
        """
        run = self.read_environment()["run"]
        # Read, not compared as text: a later version writes fields that an earlier one did not know.
        if write_config(read_config(self.config)) != write_config(config):
            raise FlapsamError(f"{self.config}: the run here has another configuration; resume it with that one")
        return run
