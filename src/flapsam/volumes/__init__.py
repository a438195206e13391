"""Reading and writing images: the file formats, and the volume with its position in space."""

from flapsam.volumes.allocation import room
from flapsam.volumes.dicom import Found, sort_files
from flapsam.volumes.formats import (
    FORMATS,
    Source,
    case_name,
    is_image,
    read_image,
    read_label,
    source_at,
    write_fractions,
    write_labels,
)
from flapsam.volumes.left_out import LeftOut, is_hidden, reason_of, sentences
from flapsam.volumes.legend import COLOURS, Legend, itk_snap, legend_of
from flapsam.volumes.nifti import count_modalities, is_nifti, read_geometry, write_label_like, write_volume
from flapsam.volumes.objects import labels_like, volume_of
from flapsam.volumes.series import Series, is_dicom
from flapsam.volumes.volume import (
    CANONICAL_AXES,
    Geometry,
    Volume,
    canonical_slice_axis,
    order_of,
    same_geometry,
    slice_count,
)

__all__ = [
    "CANONICAL_AXES",
    "COLOURS",
    "FORMATS",
    "Found",
    "Geometry",
    "LeftOut",
    "Legend",
    "Series",
    "Source",
    "Volume",
    "canonical_slice_axis",
    "case_name",
    "count_modalities",
    "is_dicom",
    "is_hidden",
    "is_image",
    "is_nifti",
    "itk_snap",
    "labels_like",
    "legend_of",
    "order_of",
    "read_geometry",
    "read_image",
    "read_label",
    "reason_of",
    "room",
    "same_geometry",
    "sentences",
    "slice_count",
    "sort_files",
    "source_at",
    "volume_of",
    "write_fractions",
    "write_label_like",
    "write_labels",
    "write_volume",
]
