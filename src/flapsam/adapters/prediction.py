"""Segment images on disk with a trained adapter, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flapsam.adapters.confidence import read_confidence
from flapsam.adapters.images import find_images, images_of_split
from flapsam.adapters.label_maps import VOLUMES, Outcome, predict_images
from flapsam.adapters.model import load
from flapsam.adapters.trained import find_trained
from flapsam.base.device import set_up_torch
from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError
from flapsam.learning.inference import PredictionOptions
from flapsam.run.config import Checkpoint, Split
from flapsam.run.observer import Observer
from flapsam.volumes import LeftOut


@dataclass(frozen=True)
class Predictions:
    """Outcomes of segmenting images."""

    outcomes: Sequence[Outcome]
    """One outcome for each image."""
    volumes: Path
    """Path of the table with the classes' volumes in millilitres."""
    left_out: Sequence[LeftOut] = ()
    """Files in the searched folders that are no images, or were left out for another reason."""

    @property
    def written(self) -> list[Outcome]:
        """Outcomes of the images that have a label map."""
        return [outcome for outcome in self.outcomes if not outcome.error]

    @property
    def unusual(self) -> list[Outcome]:
        """Outcomes of the images that are unlike those that the adapter was calibrated on."""
        return [outcome for outcome in self.written if outcome.confidence and outcome.confidence.unusual]

    @property
    def failed(self) -> list[Outcome]:
        """Outcomes of the images that could not be segmented."""
        return [outcome for outcome in self.outcomes if outcome.error]

    def as_json(self) -> dict[str, Any]:
        """The outcomes as JSON for other programs."""
        return {
            "written": [str(path) for outcome in self.written for path in outcome.written],
            "images": [outcome.as_json() for outcome in self.outcomes],
            "volumes": str(self.volumes),
            "left_out": [{"path": str(one.path), "reason": one.reason} for one in self.left_out],
        }


def predict(
    trained: Path,
    images: Sequence[Path],
    output: Path,
    *,
    split: Split | None = None,
    series: str | None = None,
    options: PredictionOptions = PredictionOptions(),
    confidence: Path | None = None,
    dicom_seg: bool = True,
    resume: bool = False,
    checkpoint: Checkpoint | None = None,
    device: str = "cpu",
    precision: Literal["fp32", "bf16", "fp16", "auto"] | None = "auto",
    threads: int | None = None,
    observer: Observer | None = None,
) -> Predictions:
    """Segment images and write a label map for each.

    Args:
        trained: folder of a run or of an adapter.
        images: image files, folders, which are searched at any depth, or lists of paths (``.txt``).
        output: folder for the label maps.
        split: segment only the cases of this split. ``images`` must then be one folder of sites.
        series: pattern for the description, number or UID of a series, which selects from folders with several DICOM series.
        options: optional steps beyond predicting every slice once.
        confidence: file from ``flapsam calibrate``, by which every label map is judged.
        dicom_seg: whether DICOM images also get a DICOM segmentation, beside the NIfTI label map.
        resume: skip images that the same adapter has segmented into this folder with the same options.
        checkpoint: the backbone's checkpoint, if the adapter needs one.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        precision: precision of the image encoder, as for ``load``.
        threads: number of threads; all cores if None.
        observer: follows the images.

    Raises:
        FlapsamError: there is no adapter or no image, the output folder cannot be written, or ``confidence`` is no
            calibration of this adapter and these options. An image that cannot be
            segmented raises nothing. It is listed in ``Predictions.failed``.
    """
    adapter = find_trained(trained)
    judge = read_confidence(confidence, adapter.folder, options) if confidence else None
    left_out: list[LeftOut] = []
    if split is None:
        jobs, left_out = find_images(images, adapter, series=series, output=output)
    elif len(images) == 1:
        jobs = images_of_split(images[0], adapter, split)
    else:
        raise FlapsamError("--split needs exactly one folder of sites; leave the other paths out")
    set_up_torch(threads or default_threads(), deterministic=True)
    model = load(trained, checkpoint=checkpoint, device=device, precision=precision)
    outcomes = predict_images(
        model,
        adapter,
        jobs,
        output,
        options=options,
        segmentation=dicom_seg,
        confidence=judge,
        resume=resume,
        observer=observer or Observer(),
    )
    return Predictions(list(outcomes), output / VOLUMES, left_out)
