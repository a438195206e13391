"""From the values in a label file to the classes of the run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.run.config import Data, as_values

IGNORED = -100
"""Class of a voxel that neither loss nor scores look at."""


@dataclass(frozen=True)
class LabelMap:
    """One site's reading of label values."""

    classes: tuple[str, ...]
    index_of: dict[int, int]
    """Value in the file → class index; 0 is background."""
    annotated: frozenset[int]
    """Indices of the classes that this site annotates."""

    def apply(self, array: NDArray, path: Path) -> NDArray[np.int8]:
        """Class indices of a label map.

        Where the site leaves a class unannotated, background may hide it: there background becomes ``IGNORED``.

        Raises:
            FlapsamError: a value in the file belongs to no class; ``path`` names the file in the message.
        """
        result = np.full(array.shape, IGNORED, np.int8)
        known = np.zeros(array.shape, bool)
        for value, index in self.index_of.items():
            voxels = array == value
            known |= voxels
            result[voxels] = index
        if not known.all():
            unknown = ", ".join(str(value) for value in np.unique(array[~known])[:5])
            raise FlapsamError(f"{path}: label value {unknown} belongs to no class; name it under data.labels")
        if len(self.annotated) < len(self.classes):
            result[result == 0] = IGNORED
        return result


def label_map(data: Data, site: str) -> LabelMap:
    """The label map of one site: ``labels``, with what ``site_labels`` says otherwise."""
    values = data.labels | data.site_labels.get(site, {})
    index_of = {0: 0}
    for index, name in enumerate(data.classes, start=1):
        index_of |= dict.fromkeys(as_values(values[name]), index)
    index_of |= dict.fromkeys(as_values(values.get("background")), 0)
    index_of |= dict.fromkeys(as_values(values.get("ignore")), IGNORED)
    annotated = frozenset(index for index, name in enumerate(data.classes, start=1) if values[name] is not None)
    return LabelMap(tuple(data.classes), index_of, annotated)
