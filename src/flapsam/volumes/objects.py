"""Volumes in memory, as objects of other libraries, and label maps as objects of the same kind."""

import sys
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from flapsam.base.errors import FlapsamError
from flapsam.volumes.itk import LPS
from flapsam.volumes.itk import affine_of as itk_affine
from flapsam.volumes.nifti import LABEL_MAP, MODALITIES, affine_of, header_for, image_like
from flapsam.volumes.volume import Volume, check_affine, check_finite

if TYPE_CHECKING:
    import SimpleITK
    from monai.data.meta_tensor import MetaTensor


def volume_of(image: Any, affine: NDArray | None = None) -> Volume:
    """The volume of an image object.

    Args:
        image: a NumPy array (i, j, k) or (i, j, k, modality) with ``affine``, a nibabel image, a SimpleITK image, or a
            MONAI ``MetaTensor`` (i, j, k) or (channel, i, j, k).
        affine: affine (4, 4) of a NumPy array, from voxel index to millimetres in RAS+.

    Raises:
        FlapsamError: the image is of another type, has no affine or a singular one, is not 3-D, or holds NaN or infinity.
    """
    if _is_sitk(image):
        import SimpleITK as sitk

        if image.GetDimension() != 3:
            raise FlapsamError(f"the image has {image.GetDimension()} dimensions; a 3-D volume is needed")
        array, affine = sitk.GetArrayFromImage(image).transpose(), itk_affine(image)
        if image.GetNumberOfComponentsPerPixel() > 1:
            array = np.moveaxis(array, 0, -1)
    elif _is_meta_tensor(image):
        array, affine = image.detach().cpu().numpy(), _ras(image)
        array = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
    elif isinstance(image, SpatialImage):
        array = np.asanyarray(image.dataobj)
        affine = affine_of(image, "the image") if isinstance(image, nibabel.Nifti1Pair) else image.affine
    elif isinstance(image, np.ndarray):
        array = image
        if affine is None:
            raise FlapsamError("a NumPy array has no position in space; give its affine, as in predict(array, affine)")
        affine = np.asarray(affine, np.float64)
        if affine.shape != (4, 4):
            raise FlapsamError(f"the affine has shape {affine.shape}; an affine of shape (4, 4) is needed")
    else:
        raise FlapsamError(
            f"a {type(image).__name__} is not a volume; give a path, a NumPy array with its affine, "
            "a nibabel or SimpleITK image, or a MONAI MetaTensor"
        )
    return _checked(array, check_affine(affine, "the image"))


def _checked(array: NDArray, affine: NDArray[np.float64]) -> Volume:
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4) or 0 in array.shape or (array.ndim == 4 and array.shape[3] > MODALITIES):
        raise FlapsamError(f"the image has shape {array.shape}; a 3-D volume with up to three modalities is needed")
    if array.dtype.kind not in "iuf":
        raise FlapsamError(f"voxels are of type {array.dtype}; one plain number per voxel is needed")
    check_finite(array, "the image")
    return Volume(array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array, affine)


def labels_like(labels: NDArray[np.uint8], image: Any) -> Any:
    """A label map (i, j, k) as an object of the same kind and at the same position as the segmented image."""
    if _is_sitk(image):
        return _sitk_like(labels, image)
    if _is_meta_tensor(image):
        return _meta_tensor_like(labels, image)
    if isinstance(image, nibabel.Nifti1Pair):
        # The affine may have been changed after loading. nibabel then saves that, and else the header's own position.
        return image_like(labels, image.affine, header_for(np.uint8, LABEL_MAP, image.header))
    if isinstance(image, SpatialImage):
        return nibabel.Nifti1Image(labels, image.affine)
    return labels


def _sitk_like(labels: NDArray[np.uint8], image: "SimpleITK.Image") -> "SimpleITK.Image":
    import SimpleITK as sitk

    label_map = sitk.GetImageFromArray(labels.transpose())
    label_map.CopyInformation(image)
    return label_map


def _meta_tensor_like(labels: NDArray[np.uint8], image: "MetaTensor") -> "MetaTensor":
    import torch
    from monai.data.meta_tensor import MetaTensor

    tensor = torch.from_numpy(np.ascontiguousarray(labels))
    return MetaTensor(tensor[None] if image.ndim == 4 else tensor, meta=image.meta)


def _is_sitk(image: Any) -> bool:
    """Whether an object is an image of SimpleITK. SimpleITK is not imported to find out."""
    return "SimpleITK" in sys.modules and isinstance(image, sys.modules["SimpleITK"].Image)


def _is_meta_tensor(image: Any) -> bool:
    return "monai" in sys.modules and type(image).__name__ == "MetaTensor"


def _ras(image: "MetaTensor") -> NDArray[np.float64]:
    affine = image.affine.detach().cpu().numpy().astype(np.float64)
    return LPS @ affine if str(image.meta.get("space", "RAS")).endswith("LPS") else affine
