"""What every backbone states about itself, whatever its image encoder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flapsam.base.errors import FlapsamError


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """All hyperparameters of a network, and how its family builds, names and loads the image encoder.

    A family is a subclass in a file of its own. Its sizes are the members of ``ARCHITECTURES``.

    The encoder of a family is a module that maps images (batch, 3, size, size) to an embedding (batch, channels, tokens,
    tokens). Its ``layers`` are the blocks with attention. Each block has an ``attn`` with the linear layers ``q_proj``,
    ``k_proj``, ``v_proj`` and ``proj``, on which low-rank adapters sit. The encoder's method ``fuse`` prepares it, in place,
    for prediction alone.
    """

    depth: int
    """Blocks with attention in the image encoder."""
    stride: int = 16
    """Pixels between neighbouring tokens of the embedding."""
    native_size: int = 1024
    """Side of the images that the published weights were trained on, in pixels."""
    default_size: int = 224
    """Side of the network's input if ``samples.size`` is not given, in pixels."""
    decoder_width: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    upscaling: tuple[int, ...] = (64, 32, 16, 8)
    """Channels after each upsampling step, which doubles the token grid. The rest, up to the input's resolution, is
    interpolated."""
    iou_width: int = 256

    whose: ClassVar[Mapping[str, str]]
    """Naming scheme of checkpoints of this family → whose names these are, for the user."""
    boxes_end_with_padding: ClassVar[bool] = False
    """Whether a box, like a list of points, is followed by the token that means no further point."""

    @property
    def multiple(self) -> int:
        """The image size is a multiple of this number of pixels."""
        return self.stride

    def tokens(self, image_size: int) -> int:
        """Number of tokens along one side of an image.

        Raises:
            FlapsamError: the image size does not fit the backbone.
        """
        if image_size < self.multiple or image_size % self.multiple:
            raise FlapsamError(f"samples.size {image_size} is not a multiple of {self.multiple}, as this backbone needs")
        return image_size // self.stride

    @abstractmethod
    def encoder(self, image_size: int) -> Any:
        """Build the image encoder."""

    @abstractmethod
    def decoder(self, masks: int) -> Any:
        """Build the mask decoder for a number of masks."""

    @abstractmethod
    def values_a_slice(self, image_size: int) -> int:
        """Numbers that the encoder's largest layer holds for an image, as an estimate of its memory."""

    @classmethod
    @abstractmethod
    def naming_of(cls, state: Mapping[str, Tensor]) -> str | None:
        """The naming scheme of a state dictionary, as a key of ``whose``; None if it is not of this family."""

    @classmethod
    @abstractmethod
    def to_own_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a checkpoint's tensors to the network's names, split each fused qkv, and leave out what has no use."""

    @abstractmethod
    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether tensors, in the network's names, have this architecture's shapes. ``KeyError`` means that they do not."""

    def fitted(self, state: Mapping[str, Tensor], image_size: int) -> dict[str, Tensor]:
        """The tensors, in the network's names, with position embeddings resized to an image size."""
        return dict(state)

    @classmethod
    def trained_size(cls, state: Mapping[str, Tensor]) -> int | None:
        """Side in pixels of the images that a checkpoint was trained on, if its tensors, in the network's names, show it."""
        return None

    def to_transformers(self, network: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The network's tensors and configuration for transformers.

        Raises:
            FlapsamError: transformers has no model of this family.
        """
        raise FlapsamError("transformers has no model with this backbone; use the format onnx")
