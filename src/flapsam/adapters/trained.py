"""Find the adapter of a run."""

from dataclasses import dataclass
from pathlib import Path

from flapsam.adapters.store import CARD
from flapsam.base.errors import FlapsamError
from flapsam.run.config import Checkpoint, RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER
from flapsam.run.reading import read_config


@dataclass(frozen=True)
class Trained:
    """An adapter's folder, and the configuration of its run if the folder lies in one."""

    folder: Path
    run: RunConfig | None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Checkpoint that the adapter's run used, or None if it is unknown."""
        return self.run.backbone.weights if self.run else None


def find_trained(path: Path) -> Trained:
    """Find the adapter at ``path``, the folder of an adapter or of a run.

    Raises:
        FlapsamError: the path is neither.
    """
    for folder in (path, RunFolder(path).adapter(TOGETHER)):
        if (folder / CARD).exists():
            configs = (RunFolder(parent).config for parent in (path, path.parent, path.parent.parent))
            config = next((config for config in configs if config.exists()), None)
            return Trained(folder, read_config(config) if config else None)
    raise FlapsamError(f"{path}: neither an adapter nor a finished run; an adapter's folder contains {CARD}")
