"""The image and the label map of a case, read together and checked against each other."""

from flapsam.base.errors import FlapsamError
from flapsam.sites.case import Case
from flapsam.sites.labels import LabelMap
from flapsam.volumes import Geometry, Volume, order_of, read_image, read_label


def check_geometry(case: Case, image: Geometry, label: Geometry) -> None:
    """Check that image and label map lie on the same grid. Their voxels may be stored in another order.

    Raises:
        FlapsamError: their shapes or their affines differ.
    """
    check_grid(str(case.label), label, "the image", image)


def check_grid(where: str, own: Geometry, other: str, grid: Geometry) -> None:
    """Check that a label map lies on a grid. Its voxels may be stored in another order.

    Args:
        where: the label map's file, for the error message.
        own: its geometry.
        other: what lies on the grid, for the error message, such as ``the image``.
        grid: the grid.

    Raises:
        FlapsamError: the shapes or the affines differ.
    """
    if order_of(own, grid) is not None:
        return
    if sorted(own[0]) != sorted(grid[0]):
        raise FlapsamError(
            f"{where}: its shape {own[0]} differs from {other}'s {grid[0]}; resample the label map to {other}"
        )
    raise FlapsamError(
        f"{where}: its affine differs from {other}'s, so the two lie in different places; resample the label map to {other}"
    )


def on_grid(label: Volume, where: str, other: str, grid: Geometry) -> Volume:
    """The label map with its voxels in the order of a grid. Nothing is interpolated.

    Args:
        label: the label map.
        where: its file, for the error message.
        other: what lies on the grid, for the error message, such as ``the image``.
        grid: the grid.

    Raises:
        FlapsamError: as ``check_grid``.
    """
    check_grid(where, label.geometry, other, grid)
    return label.ordered_as(grid)


def read_files(case: Case) -> tuple[Volume, Volume]:
    """Read image and label map of a case, and check that they lie on the same grid.

    The label map's voxels get the order of the image's, if they are stored in another one.

    Raises:
        FlapsamError: a file cannot be read, or their shapes or affines differ.
    """
    image, label = read_image(*case.images), read_label(case.label)
    return image, on_grid(label, str(case.label), "the image", image.geometry)


def read_pair(case: Case, label_map: LabelMap) -> tuple[Volume, Volume]:
    """Read image and class indices of a case, and check that they lie on the same grid.

    Raises:
        FlapsamError: a file cannot be read, their shapes or affines differ, or a label value belongs to no class.
    """
    image, label = read_files(case)
    return image, Volume(label_map.apply(label.array, case.label), label.affine)
