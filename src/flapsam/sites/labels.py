"""Mapping from the values in label files to the classes of a run."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.run.config import Data, as_values, reserved

log = logging.getLogger(__name__)
IGNORED = -100
"""Class index of voxels that both loss and scores leave out."""
HIDDEN = -99
"""Class index of background where the site does not annotate every class. The loss leaves it out, because it may hide one of
the others. Scores count it, because it is none of the classes that are scored."""


@dataclass(frozen=True)
class LabelMap:
    """How one site's label values map to classes."""

    classes: tuple[str, ...]
    index_of: dict[int, int]
    """Label value in the file → class index; 0 is the background."""
    annotated: frozenset[int]
    """Indices of the classes that this site annotates."""
    ignores_unknown: bool = False
    """Whether loss and scores leave out values that belong to no class, instead of an error."""

    def apply(self, array: NDArray, path: Path) -> NDArray[np.int8]:
        """Convert the label values of one file to class indices.

        At a site that does not annotate every class, the background may hide one, so it becomes ``HIDDEN``.

        Args:
            array: the label values, of any shape.
            path: the file, for the error message.

        Returns:
            Class indices, of the same shape.

        Raises:
            FlapsamError: a value in the file belongs to no class.
        """
        result = np.full(array.shape, IGNORED, np.int8)
        known = np.zeros(array.shape, bool)
        for value, index in self.index_of.items():
            voxels = array == value
            known |= voxels
            result[voxels] = index
        if not known.all():
            unknown = ", ".join(str(value) for value in np.unique(array[~known])[:5])
            problem = f"{path}: label value {unknown} belongs to no class"
            if not self.ignores_unknown:
                raise FlapsamError(f"{problem}; add it to data.labels as a class, background or ignore")
            log.warning("%s; its voxels are left out", problem)
        if len(self.annotated) < len(self.classes):
            result[result == 0] = HIDDEN
        return result


def label_map(data: Data, site: str) -> LabelMap:
    """Map one site's label values to classes: ``data.labels``, overridden by the site's entry in ``data.site_labels``."""
    own = data.site_labels.get(site, {})
    # A site's ``ignore`` also replaces an ``Ignore`` of the whole run.
    replaced = {reserved(name) for name in own} - {""}
    values = {name: of_name for name, of_name in data.labels.items() if reserved(name) not in replaced} | own
    index_of = {0: 0}
    for index, name in enumerate(data.classes, start=1):
        index_of |= dict.fromkeys(as_values(values[name]), index)
    for name, of_name in values.items():
        if reserved(name):
            index_of |= dict.fromkeys(as_values(of_name), IGNORED if reserved(name) == "ignore" else 0)
    annotated = frozenset(index for index, name in enumerate(data.classes, start=1) if values[name] is not None)
    return LabelMap(tuple(data.classes), index_of, annotated)
