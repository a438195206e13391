"""DICOM segmentation objects out (PS3.3 A.51), by highdicom."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.codedict import codes

from flapsam.base.errors import FlapsamError
from flapsam.base.files import written_whole
from flapsam.base.version import __version__
from flapsam.volumes.dicom import Series, sorted_planes
from flapsam.volumes.legend import Legend, Segment


def write_dicom_seg(labels: NDArray, series: Series, path: Path, legend: Legend) -> None:
    """Write a label map as a DICOM segmentation of the series that was segmented: a binary frame a class and slice.

    A class is coded as SNOMED CT where its name is one that DICOM uses (``kidney``, ``liver``), else by its name alone.

    Args:
        labels: whole numbers below 256, in the axes of ``read_series``: (column, row, slice).
        series: what was segmented; patient and study are its own.
        path: where to; written whole or not at all.
        legend: names and colours.

    Raises:
        FlapsamError: the series lacks what a segmentation must say of its patient and study.
    """
    import highdicom

    planes = sorted_planes(series)
    files = list(dict.fromkeys(plane.file for plane in planes))
    frames = labels.astype(np.uint8, copy=False).transpose(2, 1, 0)
    if len(files) < len(planes):
        # All slices lie in one file, which keeps them in an order of its own.
        frames = frames[np.argsort([plane.frame for plane in planes])]
    # It tells of empty masks and of names that begin in small letters.
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            segmentation = highdicom.seg.Segmentation(
                source_images=[pydicom.dcmread(file, stop_before_pixels=True) for file in files],
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
            "--no-dicom-seg writes NIfTI alone"
        ) from error
    with written_whole(path) as temporary:
        segmentation.save_as(temporary)


def _description(segment: Segment):
    import highdicom

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
