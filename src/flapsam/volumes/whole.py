"""Label values as whole numbers, whatever type a file stores them in."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError

NEARLY = 0.001
"""Distance from a whole number within which a value is rounded. Scaled integers and floats are off by less."""
EXACT = 2**24
"""From here on, float32 does not hold every whole number."""


def whole_labels(array: NDArray, where: Path | str) -> NDArray[np.int32]:
    """The label values as int32.

    Args:
        array: finite numbers (i, j, k).
        where: the file, for the error message.

    Raises:
        FlapsamError: a number is not within 0.001 of a whole number, or is too large.
    """
    floating = array.dtype.kind == "f"
    most = EXACT - 1 if floating else np.iinfo(np.int32).max
    for value in (array.min(), array.max()):
        if not -most <= value <= most:
            shown = f"{value:.9g}" if floating else value
            raise FlapsamError(
                f"{where}: label value {shown} belongs to no class, because it is too large; correct the file"
            )
    if not floating:
        return array.astype(np.int32)
    whole = np.empty(array.shape, np.int32)
    # Slice by slice, because the copies of a whole volume would need a lot of memory.
    for place in np.ndindex(array.shape[2:]):
        values = array[(..., *place)]
        whole[(..., *place)] = nearest = np.rint(values)
        # What the type itself cannot hold is not counted, so that 2.001 is within 0.001 of 2.
        off = np.abs(values - nearest) - np.finfo(values.dtype).eps * np.abs(values)
        if off.max() > NEARLY:
            voxel = np.unravel_index(int(off.argmax()), off.shape)
            raise FlapsamError(
                f"{where}: a label map holds whole numbers, but this one holds {values[voxel]:.7g} "
                f"at voxel ({', '.join(map(str, (*voxel, *place)))}); is it an image?"
            )
    return whole
