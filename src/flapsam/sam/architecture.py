"""The model sizes of Segment Anything."""

from dataclasses import dataclass

from flapsam.base.errors import FlapsamError, choose


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All hyperparameters of a network."""

    width: int
    """Channels of the image encoder's tokens."""
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    """Blocks that attend over the whole image; the others attend within windows."""
    window: int = 14
    """Side of a window, in tokens."""
    patch: int = 16
    native_size: int = 1024
    """Side of the images that the published weights were trained on, in pixels."""
    default_size: int = 224
    """Side of the network's input if ``samples.size`` is not given, in pixels."""
    decoder_width: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    upscaling: tuple[int, ...] = (64, 32, 16, 8)
    """Channels after each of the four upsampling steps, which double the token grid up to the input's resolution."""
    iou_width: int = 256

    def tokens(self, image_size: int) -> int:
        """Number of tokens along one side of an image.

        Raises:
            FlapsamError: the size is not a multiple of the patch size.
        """
        if image_size % self.patch:
            raise FlapsamError(
                f"samples.size {image_size} is not a multiple of {self.patch}, the side of SAM's patches; choose one that is"
            )
        return image_size // self.patch


ARCHITECTURES: dict[str, Architecture] = {
    "sam-vit-b": Architecture(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "sam-vit-l": Architecture(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "sam-vit-h": Architecture(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    # The grid of 8 × 8 tokens fits into one window, so every block is global. The upscaling ends with 16 channels, since the
    # other sizes' 1/32 of the decoder's width would leave only 4.
    "sam-tiny": Architecture(
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
}


def architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        FlapsamError: the name is unknown.
    """
    return choose("backbone.name", name, ARCHITECTURES)
