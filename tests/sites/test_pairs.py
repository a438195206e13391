"""Label maps at the place of their image whose voxels are stored in another order. Expected values are nibabel's."""

from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from flapsam.base.errors import FlapsamError
from flapsam.federation.preparation import check_pairs
from flapsam.sites import Case, Site
from flapsam.sites.pairs import check_geometry, read_files
from flapsam.volumes import Volume, order_of, read_image, same_geometry
from tests.helpers.sites import save

SHAPE = (5, 6, 7)
LABEL = np.random.default_rng(0).integers(0, 3, SHAPE, np.uint8)
ORDERS = [list(zip(axes, flips, strict=True)) for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)]


def affine_of(degrees: tuple[float, float, float], spacing: tuple[float, float, float] = (0.9, 1.1, 3)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = 40, -30, 10
    return affine


def reordered(array: np.ndarray, affine: np.ndarray, order: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine in another order, by nibabel."""
    image = nibabel.Nifti1Image(array, affine).as_reoriented(order)
    assert image.affine is not None
    return np.asarray(image.dataobj), image.affine


PLACES = {
    "upright": affine_of((0, 0, 0)),
    "oblique": affine_of((3, -5, 8)),
    "at 45°, where no axis is nearest": affine_of((45, 45, 45)),
    "mirrored": affine_of((10, 0, 170)) @ np.diag([-1, 1, 1, 1]),
    "thick slices": affine_of((0, 30, 0), (0.3, 0.3, 6)),
}


@pytest.mark.parametrize("affine", PLACES.values(), ids=PLACES)
def test_every_order_of_the_voxels_is_recognised(affine: np.ndarray):
    for order in ORDERS:
        stored = Volume(*reordered(LABEL, affine, order))
        found = order_of(stored.geometry, (SHAPE, affine))
        assert found is not None
        array, place = reordered(stored.array, stored.affine, found)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(array, LABEL)
        assert same_geometry(affine, place, SHAPE)


@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[3], ORDERS[17], ORDERS[30], ORDERS[-1]])
def test_a_label_map_in_another_order_is_read_in_the_images(order: list[tuple[int, int]], tmp_path: Path):
    affine = PLACES["oblique"]
    image = save(LABEL.astype(np.float32), tmp_path / "image.nii.gz", affine)
    array, place = reordered(LABEL, affine, order)
    case = Case("a", "s", "a", image, save(array, tmp_path / "label.nii.gz", place), "train")
    check_pairs([Site("s", (case,))])
    volume, label = read_files(case)
    np.testing.assert_array_equal(label.array, LABEL)
    np.testing.assert_array_equal(label.affine, volume.affine)


def test_a_label_map_that_simpleitk_has_turned_is_read_in_the_images_order(tmp_path: Path):
    affine = PLACES["oblique"]
    image = save(LABEL.astype(np.float32), tmp_path / "image.nii.gz", affine)
    turned = sitk.DICOMOrient(sitk.Cast(sitk.ReadImage(str(image)), sitk.sitkUInt8), "PIR")
    sitk.WriteImage(turned, str(tmp_path / "label.nrrd"))
    assert turned.GetSize() != SHAPE
    _, label = read_files(Case("a", "s", "a", image, tmp_path / "label.nrrd"))
    np.testing.assert_array_equal(label.array, LABEL)


def test_a_modality_in_another_order_is_read_in_the_order_of_the_first(tmp_path: Path):
    affine = PLACES["oblique"]
    first = save(LABEL, tmp_path / "a_0000.nii.gz", affine)
    array, place = reordered(LABEL + 1, affine, ORDERS[17])
    second = save(array, tmp_path / "a_0001.nii.gz", place)
    np.testing.assert_array_equal(read_image(first, second).array, np.stack([LABEL, LABEL + 1], -1))


MOVED = affine_of((3, -5, 8))
MOVED[0, 3] += 0.9
OTHERS = {
    "one voxel away": (SHAPE, MOVED, "its affine differs from the image's"),
    "turned by 5°": (SHAPE, affine_of((3, -5, 13)), "its affine differs from the image's"),
    "another spacing": (SHAPE, affine_of((3, -5, 8), (0.9, 1.1, 2.5)), "its affine differs from the image's"),
    "flipped in place": (SHAPE, PLACES["oblique"] @ np.diag([-1, 1, 1, 1]), "its affine differs from the image's"),
    "axes swapped without moving them": ((6, 5, 7), PLACES["oblique"], "its affine differs from the image's"),
    "a slice less": ((5, 6, 6), PLACES["oblique"], "its shape (5, 6, 6) differs from the image's (5, 6, 7)"),
}


@pytest.mark.parametrize(("shape", "affine", "message"), OTHERS.values(), ids=OTHERS)
def test_a_label_map_in_another_place_is_refused(shape: tuple[int, int, int], affine: np.ndarray, message: str):
    case = Case("a", "s", "a", Path("image.nii.gz"), Path("label.nii.gz"))
    with pytest.raises(FlapsamError) as caught:
        check_geometry(case, (SHAPE, PLACES["oblique"]), (shape, affine))
    assert message in str(caught.value)
