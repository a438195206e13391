"""Writing DICOM segmentation objects (PS3.3 A.51) with highdicom."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.base.files import written_whole
from flapsam.base.version import __version__
from flapsam.volumes.dicom_file import opened
from flapsam.volumes.dicom_slices import sorted_planes
from flapsam.volumes.legend import Legend, Segment
from flapsam.volumes.series import Series

if TYPE_CHECKING:
    from pydicom import Dataset


def write_dicom_seg(labels: NDArray, series: Series, path: Path, legend: Legend) -> None:
    """Write a label map as a DICOM segmentation, with one binary frame per class and slice.

    A class has a code of SNOMED CT if DICOM uses its name (``kidney``, ``liver``), else only its name.

    Args:
        labels: whole numbers below 256, in the axes of ``read_series``: (column, row, slice).
        series: the segmented series, from which patient and study are taken.
        path: path of the segmentation, which is written completely or not at all.
        legend: names and colours of the classes.

    Raises:
        FlapsamError: the series lacks attributes of the patient or the study that a segmentation must have.
    """
    import highdicom

    planes = sorted_planes(series)
    files = list(dict.fromkeys(plane.file for plane in planes))
    frames = labels.astype(np.uint8, copy=False).transpose(2, 1, 0)
    if len(files) < len(planes):
        # All slices are in one file, which has its own order.
        frames = frames[np.argsort([plane.frame for plane in planes])]
    # highdicom warns about empty masks and about names that begin with small letters.
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            segmentation = highdicom.seg.Segmentation(
                source_images=[_source(file) for file in files],
                pixel_array=np.ascontiguousarray(frames),
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[_description(segment) for segment in legend],
                series_instance_uid=highdicom.UID(),
                series_number=int(series.number or 0) % 10_000 + 9000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="flapsam",
                manufacturer_model_name="flapsam",
                software_versions=__version__,
                device_serial_number="0",
                content_label="FLAPSAM",
                content_description="Segmentation by flapsam",
                series_description="Segmentation by flapsam",
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FlapsamError(
            f"{series}: it cannot be the source of a DICOM segmentation ({_first_line(error)}); "
            "use --no-dicom-seg to write only NIfTI"
        ) from error
    with written_whole(path) as temporary:
        segmentation.save_as(temporary)


def _source(file: Path) -> "Dataset":
    import pydicom
    from pydicom.uid import UID, CTImageStorage, MRImageStorage, SecondaryCaptureImageStorage

    with opened(file, pixels=False) as stream:
        header = pydicom.dcmread(stream, stop_before_pixels=True)
    if "Image Storage" not in UID(str(header.get("SOPClassUID", ""))).name:
        # highdicom takes no class that an anonymiser made up.
        classes = {"CT": CTImageStorage, "MR": MRImageStorage}
        header.SOPClassUID = classes.get(str(header.get("Modality")), SecondaryCaptureImageStorage)
    return header


def _description(segment: Segment):
    import highdicom
    from pydicom.sr.codedict import codes

    words = "".join(part.capitalize() for part in segment.name.replace("_", " ").replace("-", " ").split())
    try:
        kind = getattr(codes.SCT, {"Tumour": "Tumor"}.get(words, words))
    except AttributeError:
        kind = highdicom.sr.CodedConcept(f"CLASS{segment.value}", "99FLAPSAM", segment.name[:64])
    lesion = any(word in words.lower() for word in ("tumo", "lesion", "neoplasm", "cyst", "mass", "metasta"))
    return highdicom.seg.SegmentDescription(
        segment_number=segment.value,
        segment_label=segment.name[:64],
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure if lesion else codes.SCT.AnatomicalStructure,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="FLAP-SAM",
            family=codes.DCM.ArtificialIntelligence,
            version=__version__,
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*segment.rgb),
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
