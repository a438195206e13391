"""Finding what a run has trained."""

from dataclasses import dataclass
from pathlib import Path

from flapsam.adapter import CARD
from flapsam.config import RunConfig, Weights, read_config
from flapsam.errors import FlapsamError


@dataclass(frozen=True)
class Trained:
    """An adapter's folder, and the configuration of the run that it lies in, if it does."""

    folder: Path
    run: RunConfig | None

    @property
    def weights(self) -> Weights | None:
        """The checkpoint that the adapter's run used, if it is known."""
        return self.run.backbone.weights if self.run else None


def find_trained(path: Path) -> Trained:
    """The adapter at ``path``, which is an adapter's folder or a run's.

    Raises:
        FlapsamError: it is neither.
    """
    for folder in (path, path / "adapter"):
        if (folder / CARD).exists():
            run = next((p / "run.yaml" for p in (path, path.parent, path.parent.parent) if (p / "run.yaml").exists()), None)
            return Trained(folder, read_config(run) if run else None)
    raise FlapsamError(f"{path}: neither an adapter nor a finished run; an adapter's folder holds {CARD}")
