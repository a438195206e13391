"""Image and label map of a case, read together and checked against each other."""

from flapsam.base.errors import FlapsamError
from flapsam.sites.case import Case
from flapsam.sites.labels import LabelMap
from flapsam.volumes import Geometry, Volume, read_image, read_label, same_geometry


def check_geometry(case: Case, image: Geometry, label: Geometry) -> None:
    """Raise FlapsamError unless image and label map have the same shape and place in space."""
    if image[0] != label[0]:
        raise FlapsamError(
            f"{case.label}: its shape {label[0]} differs from the image's {image[0]}; resample the label map to the image"
        )
    if not same_geometry(image[1], label[1], image[0]):
        raise FlapsamError(
            f"{case.label}: its affine differs from the image's, so they lie at different places; "
            "resample the label map to the image"
        )


def read_files(case: Case) -> tuple[Volume, Volume]:
    """Image and label map of a case as they are stored, checked against each other.

    Raises:
        FlapsamError: either file is broken, or their geometry differs.
    """
    image, label = read_image(*case.images), read_label(case.label)
    check_geometry(case, image.geometry, label.geometry)
    return image, label


def read_pair(case: Case, label_map: LabelMap) -> tuple[Volume, Volume]:
    """Image and class indices of a case, checked against each other.

    Raises:
        FlapsamError: either file is broken, their geometry differs, or a label value belongs to no class.
    """
    image, label = read_files(case)
    return image, Volume(label_map.apply(label.array, case.label), label.affine)
