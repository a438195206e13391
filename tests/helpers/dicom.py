"""DICOM series for tests, written with pydicom alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
Change = Callable[[Dataset, int], None]


def _header(path: Path, kind: UID, series: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    header.SOPClassUID, header.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    header.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    header.SeriesInstanceUID = generate_uid(entropy_srcs=[series])
    header.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
    header.PatientID, header.PatientName, header.PatientBirthDate, header.PatientSex = "7", "Test^Patient", "", "O"
    header.StudyID, header.StudyDate, header.StudyTime, header.AccessionNumber = "1", "20260101", "120000", ""
    header.ReferringPhysicianName, header.Manufacturer, header.Modality = "", "made up", "CT"
    header.SeriesNumber, header.SeriesDescription = 3, series
    header.PositionReferenceIndicator = ""
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.PixelRepresentation = 0
    return header


def _geometry(affine: NDArray) -> tuple[NDArray, list[float], list[float]]:
    """The affine in LPS, the direction cosines, and the spacing between rows and between columns."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = lps[:3, :3] / spacing
    return lps, [*cosines[:, 0], *cosines[:, 1]], [spacing[1], spacing[0]]


def save_series(
    folder: Path,
    array: NDArray,
    affine: NDArray,
    *,
    series: str = "made up",
    order: Sequence[int] | None = None,
    change: Change = lambda header, index: None,
) -> Path:
    """Save a volume as a DICOM series with one file for each slice.

    Args:
        folder: folder to write to.
        array: voxels (i, j, k), whole numbers from −1024 to 3071. k must grow along the slices' normal.
        affine: affine to RAS+.
        series: description of the series.
        order: numbers in the files' names. By default, the numbers of the slices.
        change: called with each header and its slice number before the file is written.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps, directions, spacing = _geometry(affine)
    for index in range(array.shape[2]):
        path = folder / f"{series.replace(' ', '_')}_{order[index] if order else index:04d}.dcm"
        header = _header(path, CTImageStorage, series)
        header.InstanceNumber = index + 1
        header.Rows, header.Columns = array.shape[1], array.shape[0]
        header.ImageOrientationPatient, header.PixelSpacing = directions, spacing
        header.ImagePositionPatient = list((lps @ [0, 0, index, 1])[:3])
        header.SliceThickness = 1
        header.RescaleSlope, header.RescaleIntercept = 1, -1024
        header.PixelData = (array[:, :, index].T + 1024).astype(np.uint16).tobytes()
        change(header, index)
        header.save_as(path, enforce_file_format=True)
    return folder


def save_enhanced(path: Path, array: NDArray, affine: NDArray, order: Sequence[int]) -> Path:
    """Save all slices in one enhanced DICOM file, with the frames in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps, directions, spacing = _geometry(affine)
    header = _header(path, EnhancedCTImageStorage, "enhanced")
    header.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    header.InstanceNumber, header.NumberOfFrames = 1, len(order)
    header.Rows, header.Columns = array.shape[1], array.shape[0]

    def item(**fields: object) -> Dataset:
        dataset = Dataset()
        for name, value in fields.items():
            setattr(dataset, name, Items([value]) if isinstance(value, Dataset) else value)
        return dataset

    header.SharedFunctionalGroupsSequence = Items(
        [
            item(
                PlaneOrientationSequence=item(ImageOrientationPatient=directions),
                PixelMeasuresSequence=item(PixelSpacing=spacing, SliceThickness=1),
                PixelValueTransformationSequence=item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU"),
            )
        ]
    )
    header.PerFrameFunctionalGroupsSequence = Items(
        [
            item(
                PlanePositionSequence=item(ImagePositionPatient=list((lps @ [0, 0, index, 1])[:3])),
                FrameContentSequence=item(StackID="1", InStackPositionNumber=index + 1, DimensionIndexValues=[1, index + 1]),
            )
            for index in order
        ]
    )
    header.PixelData = b"".join((array[:, :, index].T + 1024).astype(np.uint16).tobytes() for index in order)
    header.save_as(path, enforce_file_format=True)
    return path


def changed(path: Path, change: Callable[[Dataset], None]) -> None:
    """Change the header of one file of a series."""
    header = pydicom.dcmread(path)
    change(header)
    header.save_as(path)
