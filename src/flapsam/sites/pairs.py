"""The image and the label map of a case, read together and checked against each other."""

from flapsam.base.errors import FlapsamError
from flapsam.sites.case import Case
from flapsam.sites.labels import LabelMap
from flapsam.volumes import Geometry, Volume, read_image, read_label, same_geometry


def check_geometry(case: Case, image: Geometry, label: Geometry) -> None:
    """Check that image and label map lie on the same grid.

    Raises:
        FlapsamError: their shapes or their affines differ.
    """
    if image[0] != label[0]:
        raise FlapsamError(
            f"{case.label}: its shape {label[0]} differs from the image's {image[0]}; resample the label map to the image"
        )
    if not same_geometry(image[1], label[1], image[0]):
        raise FlapsamError(
            f"{case.label}: its affine differs from the image's, so the two lie in different places; "
            "resample the label map to the image"
        )


def read_files(case: Case) -> tuple[Volume, Volume]:
    """Read image and label map of a case as they are stored, and check that they lie on the same grid.

    Raises:
        FlapsamError: a file cannot be read, or their shapes or affines differ.
    """
    image, label = read_image(*case.images), read_label(case.label)
    check_geometry(case, image.geometry, label.geometry)
    return image, label


def read_pair(case: Case, label_map: LabelMap) -> tuple[Volume, Volume]:
    """Read image and class indices of a case, and check that they lie on the same grid.

    Raises:
        FlapsamError: a file cannot be read, their shapes or affines differ, or a label value belongs to no class.
    """
    image, label = read_files(case)
    return image, Volume(label_map.apply(label.array, case.label), label.affine)
