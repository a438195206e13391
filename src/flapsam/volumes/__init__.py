"""Images in and out: files, and the volume with its place in space."""

from flapsam.volumes.nifti import (
    case_name,
    count_modalities,
    is_nifti,
    read_geometry,
    read_image,
    read_label,
    write_label_like,
    write_volume,
)
from flapsam.volumes.volume import (
    CANONICAL_AXES,
    Geometry,
    Volume,
    canonical_slice_axis,
    from_canonical,
    same_geometry,
    slice_count,
)

__all__ = [
    "CANONICAL_AXES",
    "Geometry",
    "Volume",
    "canonical_slice_axis",
    "case_name",
    "count_modalities",
    "from_canonical",
    "is_nifti",
    "read_geometry",
    "read_image",
    "read_label",
    "same_geometry",
    "slice_count",
    "write_label_like",
    "write_volume",
]
