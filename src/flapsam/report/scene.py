"""Scenes for the viewer: an image with label maps over it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from flapsam.base.errors import FlapsamError
from flapsam.report.cases import CaseKey, cases_of
from flapsam.report.run import TITLES, Run
from flapsam.sites import Case, label_map
from flapsam.sites.pairs import read_pair
from flapsam.volumes import Legend, Volume, legend_of, order_of, read_image, read_label, source_at

SHOWN = 0.5
"""Opacity of the first label map. The others start invisible and can be faded in."""

DRAWN = (np.uint8, np.int16, np.uint16)
"""Integer types that NiiVue draws without conversion."""


@dataclass(frozen=True)
class Layer:
    """A volume that is read when the browser requests it."""

    name: str
    read: Callable[[], Volume]
    fractions: bool = False
    """Whether its voxels are fractions from 0 to 1 instead of the values of the legend."""


@dataclass(frozen=True)
class Scene:
    """An image with its label maps, and the names and colours of their values."""

    title: str
    layers: Sequence[Layer]
    """The image, then the label maps."""
    legend: Legend


def scenes_of(run: Run) -> dict[CaseKey, Scene]:
    """(site, case) → scene, for every case with a predicted label map.

    Raises:
        FlapsamError: the run has written no label maps, or its data are not on this machine.
    """
    cases = cases_of(run)
    scenes: dict[CaseKey, Scene] = {}
    for key, case in sorted(cases.items()):
        maps = {mode: run.folder.label_map(mode, case.site, case.name) for mode in TITLES}
        layers = [
            Layer(f"prediction, {TITLES[mode]}", lambda path=path: read_label(path))
            for mode, path in maps.items()
            if path.exists()
        ]
        if layers:
            image, truth = _image_and_truth(run, case)
            scenes[key] = Scene(f"{case.site}, {case.name}", [image, *layers, truth], legend_of(run.classes))
    if not scenes:
        reason = "the run has written no label maps yet" if cases else f"its data are not in {run.config.data.path}"
        raise FlapsamError(f"{run.folder.path}: has no case to show, because {reason}")
    return scenes


def scene_of(
    image: Path, label_maps: Sequence[tuple[str, Path]], classes: Sequence[str], uncertainty: Path | None = None
) -> Scene:
    """Read an image and its label maps from files.

    Args:
        image: the image's file in any supported format, or a folder with a DICOM series.
        label_maps: name and file of each label map.
        classes: names of the values 1, 2, …. Further values get the name ``value N``.
        uncertainty: file with the uncertainty of every voxel, as ``flapsam predict`` writes it.

    Raises:
        FlapsamError: a file is missing or broken, or a map has another shape than the image.
    """
    source = source_at(image)
    volume = read_image(source)
    maps = [(name, path, _ordered(read_label(path), volume)) for name, path in label_maps]
    known = [(path, labels) for _, path, labels in maps]
    layers = [Layer("image", lambda: volume), *(Layer(name, lambda labels=labels: labels) for name, _, labels in maps)]
    if uncertainty:
        fractions = _ordered(read_image(uncertainty), volume)
        known.append((uncertainty, fractions))
        layers.append(Layer("uncertainty", lambda: fractions, fractions=True))
    for path, over in known:
        if over.array.shape != volume.array.shape[:3]:
            raise FlapsamError(f"{path}: has shape {over.array.shape}, but {image} has shape {volume.array.shape[:3]}")
    highest = max((int(labels.array.max()) for _, _, labels in maps), default=0)
    names = [*classes, *(f"value {value}" for value in range(len(classes) + 1, highest + 1))]
    return Scene(image.name, layers, legend_of(names))


def _ordered(labels: Volume, image: Volume) -> Volume:
    """The label map with its voxels in the image's order, if it lies on the image's grid in any order."""
    return labels if order_of(labels.geometry, image.geometry) is None else labels.ordered_as(image.geometry)


def nifti_of(volume: Volume) -> bytes:
    """A volume as the bytes of an uncompressed NIfTI file, with only the first modality if there are several."""
    array = volume.array[..., 0] if volume.array.ndim == 4 else volume.array
    low, high = array.min(), array.max()
    # The narrowest type that holds the values, of those that the viewer draws.
    whole = array.dtype.kind in "iub"
    fitting = [t for t in DRAWN if whole and np.iinfo(t).min <= low and high <= np.iinfo(t).max]
    array = array.astype(fitting[0] if fitting else np.float32, copy=False)
    return nibabel.Nifti1Image(array, volume.affine, dtype=array.dtype).to_bytes()


def _image_and_truth(run: Run, case: Case) -> tuple[Layer, Layer]:
    labels = label_map(run.config.data, case.site)

    def truth() -> Volume:
        volume = read_pair(case, labels)[1]
        # Voxels that are not scored are negative, and shown as background.
        return Volume(np.maximum(volume.array, 0), volume.affine)

    return Layer("image", lambda: read_image(*case.images)), Layer("truth", truth)
