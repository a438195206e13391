"""NIfTI headers whose quaternion is a little longer than 1, which nibabel does not read.

A header stores three numbers of a unit quaternion as float32, sometimes after they were rounded to a few decimals. If the
fourth is 0, the three may be longer than 1. nifti_clib, which ITK and FSL use, then makes them shorter.
"""

import math
from io import BufferedIOBase

import nibabel
from nibabel.arrayproxy import ArrayProxy
from nibabel.fileholders import FileHolder

LONGEST = 1.01
"""Length up to which the excess over 1 counts as a rounding error."""
FIELDS = ("quatern_b", "quatern_c", "quatern_d")


class LongQuaternion(ValueError):  # noqa: N818 (it becomes a sentence)
    """The quaternion of a header is too long to be a rotation. The message is its length."""


def is_too_long(error: ValueError) -> bool:
    """Whether nibabel refused a header because its quaternion is longer than 1."""
    return "w2 should be positive" in str(error)


def with_unit_quaternion(kind: type[nibabel.Nifti1Image], file: BufferedIOBase) -> nibabel.Nifti1Image:
    """The image in a file, with its quaternion made as long as 1.

    Args:
        kind: the image's class, for NIfTI-1 or NIfTI-2.
        file: the decompressed file, which stays open.

    Raises:
        LongQuaternion: the quaternion is too long for a rounding error.
    """
    file.seek(0)
    header = kind.header_class.from_fileobj(file)
    length = math.sqrt(sum(float(header[name]) ** 2 for name in FIELDS))
    if not length <= LONGEST:
        raise LongQuaternion(f"{length:g}")
    for name in FIELDS:
        header[name] = float(header[name]) / length
    files = {"image": FileHolder(fileobj=file)}
    return kind(ArrayProxy(file, header), header.get_best_affine(), header, file_map=files)
