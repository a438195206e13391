"""Names of label maps for images that are named as in nnU-Net: the label map of ``CASE_0000`` is called ``CASE``."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flapsam.base.names import folded
from flapsam.volumes import Source, case_name, is_image

NUMBERED = re.compile(r"_\d{4}$")
"""nnU-Net's modality number at the end of a file's name."""
FIRST = "_0000"
"""The number of the first modality."""


def without_numbers(images: Sequence[tuple[Source, Path]]) -> list[Path]:
    """Leave nnU-Net's number of the only modality out of the names of label maps.

    A number stays if it may be a part of the case's name: if another image in the folder has the same name with another
    number or without one, if the image's own label map has the number, too, or if two label maps would get one name.

    Args:
        images: images of one modality, and the paths of their label maps, without suffix.

    Returns:
        The paths of the label maps, in the same order.
    """
    names_in: dict[Path, set[str]] = {}
    shortened = []
    for image, stem in images:
        if isinstance(image, Path) and stem.name.endswith(FIRST) and stem.name == case_name(image):
            if image.parent not in names_in:
                names_in[image.parent] = _names(image.parent)
            if not _is_own_name(image, names_in[image.parent]):
                stem = stem.with_name(stem.name.removesuffix(FIRST))
        shortened.append(stem)
    count = Counter(folded(str(stem)) for stem in shortened)
    return [short if count[folded(str(short))] == 1 else stem for short, (_, stem) in zip(shortened, images, strict=True)]


def _is_own_name(image: Path, names: set[str]) -> bool:
    """Whether the number at the end of an image's name may be a part of the case's name."""
    name = case_name(image)
    short = name.removesuffix(FIRST)
    alike = {other for other in names if other != name and NUMBERED.sub("", other) == short}
    folder = image.absolute().parent
    # The label maps of ``images`` are in ``labels``, and those of ``imagesTs`` in ``labelsTs``.
    beside = folder.with_name("labels" + folder.name.removeprefix("images"))
    return not short or bool(alike) or (folder.name.startswith("images") and name in _names(beside))


def _names(folder: Path) -> set[str]:
    """The case names of the images in a folder, which need not exist."""
    return {case_name(path) for path in folder.iterdir() if is_image(path)} if folder.is_dir() else set()
