"""What a calibration knows of an adapter: the expected Dice of a segmentation, and what familiar images look like.

The file holds statistics of the images and scores that it was made from, and the checksum of the adapter that it belongs to.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flapsam.adapters.model import Model
from flapsam.adapters.store import CARD, PEFT_CONFIG, PEFT_WEIGHTS, PLAIN_WEIGHTS
from flapsam.base.errors import FlapsamError, too_new
from flapsam.base.files import check_file, written_whole
from flapsam.learning.confidence import FEWEST, Line
from flapsam.learning.familiarity import Familiar, Look, look
from flapsam.learning.inference import PredictionOptions
from flapsam.learning.metrics import mean
from flapsam.volumes import Volume

FORMAT = 1
"""Version of the file."""
DESCRIPTION = "flapsam"
"""Name of the description in the file's metadata."""


@dataclass(frozen=True)
class CaseConfidence:
    """How much a segmentation can be trusted."""

    dice: float | None
    """Expected mean Dice over the classes, from the line through the calibration's patients. None if no class is expected,
    or if the image is unusual, because the line says nothing about such images."""
    low: float | None
    """Lower end of the 95 % prediction interval."""
    high: float | None
    """Upper end of the interval."""
    unusual: tuple[str, ...]
    """Reasons why the image is unlike those of the calibration."""


class _Description(BaseModel):
    """The part of the file that is no array."""

    model_config = ConfigDict(extra="forbid")

    format: int
    adapter: str
    """SHA-256 of the adapter's tensors and description."""
    line: dict[str, float]
    options: dict[str, str | bool]
    """The prediction's options that change probabilities or label maps."""


@dataclass(frozen=True)
class Confidence:
    """The content of a calibration's file."""

    adapter: str
    """SHA-256 of the adapter, from ``checksum_of``."""
    line: Line
    familiar: Familiar
    options: PredictionOptions = field(default_factory=PredictionOptions)
    """The options that the calibration predicted with."""
    digest: str = ""
    """SHA-256 of the file that it was read from."""

    def judge(self, model: Model, volume: Volume, expected: Sequence[float | None], site: str = "") -> CaseConfidence:
        """Judge a segmentation of an image.

        Args:
            model: the network that segmented it.
            volume: the image.
            expected: Expected Dice of each class by the probabilities alone.
            site: the image's site, which matters where sites clip intensities differently.
        """
        unusual = tuple(self.familiar.unusual(look_of(model, volume, site)))
        value = None if unusual else mean(expected)
        return CaseConfidence(*(self.line.dice(value) if value is not None else (None, None, None)), unusual)

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all."""
        tree = {
            "format": FORMAT,
            "adapter": self.adapter,
            "line": asdict(self.line),
            "options": _plain(self.options),
        }
        with written_whole(path) as temporary:
            save_file(self.familiar.tensors(), temporary, metadata={DESCRIPTION: json.dumps(tree)})


def look_of(model: Model, volume: Volume, site: str = "", patient: str = "") -> Look:
    """What a model's encoder makes of an image. Site and patient are as in ``look``."""
    return look(model.network, volume, model.card.samples, precision=model.precision, site=site, patient=patient)


def read_confidence(path: Path, adapter: Path, options: PredictionOptions = PredictionOptions()) -> Confidence:
    """Read a calibration and check that it belongs to an adapter and to a way of predicting.

    Args:
        path: the calibration's file.
        adapter: the adapter's folder.
        options: the options of the prediction.

    Raises:
        FlapsamError: the file is missing, damaged or of a later version, or belongs to another adapter or to other options.
    """
    check_file(path)
    broken = FlapsamError(f"{path}: is not a calibration; make one with flapsam calibrate")
    try:
        with safe_open(path, "np") as file:
            tree = json.loads((file.metadata() or {})[DESCRIPTION])
            if problem := too_new(tree.get("format"), FORMAT):
                raise FlapsamError(f"{path}: {problem}")
            description = _Description.model_validate(tree)
            familiar = Familiar(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
            line = Line(**{**description.line, "patients": int(description.line["patients"])})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise broken from error
    if not familiar.fits() or not _is_possible(line):
        raise broken
    if description.adapter != checksum_of(adapter):
        raise FlapsamError(f"{path}: was made for another adapter than {adapter}; run flapsam calibrate on this one")
    if description.options != _plain(options):
        chosen = [
            f"--{name}" if value is True else f"--{name} {value}" for name, value in description.options.items() if value
        ]
        made = f"with {' '.join(chosen)}" if chosen else "without --flips, --planes, --largest and --fill"
        raise FlapsamError(f"{path}: was made {made}; predict so, too, or calibrate again with the same options")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Confidence(description.adapter, line, familiar, options, digest)


def checksum_of(adapter: Path) -> str:
    """SHA-256 of an adapter's tensors and description, without its model card."""
    digest = hashlib.sha256()
    for name in (CARD, PEFT_CONFIG, PEFT_WEIGHTS, PLAIN_WEIGHTS):
        if (path := adapter / name).exists():
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(options: PredictionOptions) -> dict[str, str | bool]:
    """The options that change probabilities or label maps."""
    return {name: getattr(options, name) for name in ("flips", "planes", "largest", "fill")}


def _is_possible(line: Line) -> bool:
    """Whether numbers from a file can be those of a line."""
    return (
        all(map(math.isfinite, asdict(line).values()))
        and line.patients >= FEWEST
        and min(line.slope, line.spread, line.error) >= 0
    )
