"""Training cases unpacked to disk, so that a window is read without loading the volume."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flapsam.base.files import write_text, written_whole
from flapsam.learning.slices import CPU, Bounds, SliceStack, ceiling, clip_bounds, stack_of
from flapsam.run.config import Samples
from flapsam.sites import IGNORED, Case, LabelMap
from flapsam.sites.pairs import read_pair

RECORD = 5
"""Version of the record beside an unpacked case."""


@dataclass(frozen=True)
class PreparedCase:
    """A training case unpacked to disk."""

    name: str
    site: str
    annotated: frozenset[int]
    """Indices of the classes that the case's site annotates."""
    slices: int
    """Number of slices."""
    occupied: frozenset[int]
    """Indices of the slices that contain a class."""
    ranges: tuple[Bounds, ...]
    """Intensity range of each slice as stored."""
    ceiling: tuple[float, ...] | None
    """Intensity of each modality at the percentile that intensities are clipped to, if there is one."""
    folder: Path
    """Folder that holds the unpacked files."""
    subject: str = ""
    """The person imaged, who may have several cases. Empty if it is not known, and then the case stands for itself."""

    @property
    def patient(self) -> str:
        """The person imaged, or the case itself if it is not known who that is."""
        return self.subject or self.name

    def stack(self, samples: Samples) -> SliceStack:
        """The images as a stack of slices, mapped from disk."""
        images = _mapped(_image_path(self.folder, self.name))
        return SliceStack(images, samples, self.ranges, clip_bounds(samples, self.site, self.ceiling))

    def labels(self) -> NDArray[np.int8]:
        """Class indices (slices, height, width), mapped from disk, with ``IGNORED`` and ``HIDDEN`` below 0."""
        return _mapped(_label_path(self.folder, self.name))

    def window(self, centre: int, depth: int, samples: Samples) -> tuple[Tensor, Tensor]:
        """A training sample: images (depth, channels, height, width) and labels (depth, height, width)."""
        return self.stack(samples).window(centre, depth), self.window_labels(centre, depth)

    def window_labels(self, centre: int, depth: int) -> Tensor:
        """The labels of a training sample: (depth, height, width). The loss leaves out voxels with −100."""
        return window_labels([(self, centre)], depth)[0]

    def indices(self, centre: int, depth: int) -> NDArray[np.int64]:
        """Indices of the ``depth`` slices around ``centre``. Beyond the volume, its outermost slice is repeated."""
        half = depth // 2
        return np.clip(np.arange(centre - half, centre + half + 1), 0, self.slices - 1)


Middle = tuple[PreparedCase, int]
"""A case and the index of a window's middle slice."""


def window_labels(places: Sequence[Middle], depth: int, device: torch.device = CPU) -> Tensor:
    """The labels of windows of the same height and width: (windows, depth, height, width)."""
    stored = np.stack([case.labels()[case.indices(centre, depth)] for case, centre in places])
    labels = torch.from_numpy(stored).to(device).long()
    return labels.masked_fill_(labels < 0, IGNORED)


def prepare(case: Case, label_map: LabelMap, samples: Samples, folder: Path) -> PreparedCase:
    """Unpack a case into ``folder``, unless it was unpacked there before and has not changed.

    Args:
        case: the case.
        label_map: says which label values stand for which class.
        samples: how volumes become samples.
        folder: the folder for unpacked cases.

    Raises:
        FlapsamError: a file is broken, or the image and its label map do not match, as in ``read_pair``.
    """
    key = _fingerprint(case, label_map, samples)
    record = folder / f"{case.name}.json"
    metadata = json.loads(record.read_text()) if record.exists() else {}
    if metadata.get("key") != key:
        image, label = read_pair(case, label_map)
        stack, labels = stack_of(image, samples), stack_of(label, samples)
        for path, array in (
            (_image_path(folder, case.name), stack.images),
            (_label_path(folder, case.name), labels.images),
        ):
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.save(file, np.ascontiguousarray(array))
        _mapped.cache_clear()
        occupied = np.flatnonzero((labels.images > 0).any(axis=(1, 2))).tolist()
        metadata = {
            "key": key,
            "slices": len(stack),
            "occupied": occupied,
            "ranges": stack.ranges,
            "ceiling": ceiling(stack.images, samples),
        }
        write_text(record, json.dumps(metadata))
    return PreparedCase(
        name=case.name,
        site=case.site,
        annotated=label_map.annotated,
        slices=metadata["slices"],
        occupied=frozenset(metadata["occupied"]),
        ranges=tuple(tuple((low, high) for low, high in bounds) for bounds in metadata["ranges"]),
        ceiling=tuple(metadata["ceiling"]) if metadata["ceiling"] else None,
        folder=folder,
        subject=case.subject,
    )


def _fingerprint(case: Case, label_map: LabelMap, samples: Samples) -> str:
    files = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in (*case.images, case.label)]
    mapping = {
        **asdict(label_map),
        "annotated": sorted(label_map.annotated),
        "index_of": sorted(label_map.index_of.items()),
    }
    if not label_map.ignores_unknown:
        # As before there was this field, so that cases are not unpacked again.
        del mapping["ignores_unknown"]
    return hashlib.sha256(json.dumps([RECORD, files, mapping, samples.axis, samples.clip_percentile]).encode()).hexdigest()


# Mapping a file for every window took a third to a half of the time of reading windows. Every map is an open file.
@lru_cache(maxsize=256)
def _mapped(path: Path) -> NDArray:
    return np.load(path, mmap_mode="r")


def _image_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.image.npy"


def _label_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.label.npy"
