"""All backbones by name, and the family that a checkpoint belongs to."""

from collections.abc import Mapping

from torch import Tensor

from flapsam.base.errors import choose
from flapsam.sam.architecture import Architecture
from flapsam.sam.hiera import Hiera
from flapsam.sam.tiny_vit import TinyVit
from flapsam.sam.vit import Vit

_TINY_VIT = {"depth": 10, "widths": (64, 128, 160, 320), "depths": (2, 2, 6, 2), "windows": (7, 14, 7)}

ARCHITECTURES: dict[str, Architecture] = {
    "sam-vit-b": Vit(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "sam-vit-l": Vit(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "sam-vit-h": Vit(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    # Its grid of 16 × 16 tokens at 128 pixels is that of its teacher, LiteMedSAM, at 64. Windows cover it without padding.
    "sam-tiny": TinyVit(
        widths=(24, 64, 128, 128),
        depths=(1, 1, 3, 1),
        depth=5,
        windows=(8, 16, 8),
        stem=(3, 2, 1),
        stride=8,
        native_size=128,
        default_size=128,
        decoder_width=128,
        decoder_mlp=512,
        upscaling=(32, 16),
        iou_width=128,
    ),
    # The grid of 8 × 8 tokens fits into one window, so every block is global. The upscaling ends with 16 channels, since the
    # other sizes' 1/32 of the decoder's width would leave only 4.
    "sam-tiny-1": Vit(
        width=192,
        depth=6,
        heads=3,
        global_blocks=tuple(range(6)),
        native_size=128,
        default_size=128,
        decoder_width=128,
        decoder_mlp=512,
        upscaling=(64, 32, 16, 16),
    ),
    # At 112 pixels, windows cover every stage without padding.
    "lite-medsam": TinyVit(**_TINY_VIT, stem=(1, 1, 1), stride=4, native_size=256, default_size=112, upscaling=(64, 32)),
    "mobile-sam": TinyVit(**_TINY_VIT, stem=(3, 2, 2)),
    "sam2.1-tiny": Hiera(width=96, heads=1, depth=12, depths=(1, 2, 7, 2), global_blocks=(5, 7, 9)),
    "sam2.1-small": Hiera(width=96, heads=1, depth=16, depths=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    "sam2.1-base-plus": Hiera(width=112, heads=2, depth=24, depths=(2, 3, 16, 3), global_blocks=(12, 16, 20), positions=14),
    "sam2.1-large": Hiera(
        width=144, heads=2, depth=48, depths=(2, 6, 36, 4), global_blocks=(23, 33, 43), windows=(8, 4, 16, 8)
    ),
}
"""Name → sizes. A new family is a subclass of ``Architecture`` in a file of its own, and an entry here."""


def architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        FlapsamError: the name is unknown.
    """
    return choose("backbone.name", name, ARCHITECTURES)


def family_of(state: Mapping[str, Tensor]) -> type[Architecture] | None:
    """The family whose checkpoint a state dictionary is; None if it is not a SAM's."""
    families = dict.fromkeys(type(sizes) for sizes in ARCHITECTURES.values())
    return next((family for family in families if family.naming_of(state)), None)


def to_own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a checkpoint's tensors to the network's names, and split each fused qkv into its three projections."""
    return (family_of(state) or Vit).to_own_names(state)


def infer_architecture(state: Mapping[str, Tensor]) -> str | None:
    """The name in ``ARCHITECTURES`` that fits the shapes of a checkpoint's tensors; None for any other size."""
    family = family_of(state) or Vit
    named = family.to_own_names(state)
    for name, sizes in ARCHITECTURES.items():
        try:
            if isinstance(sizes, family) and sizes.matches(named):
                return name
        except (KeyError, IndexError, ValueError, RuntimeError):
            continue
    return None
