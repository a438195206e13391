"""A published SAM as the teacher of a smaller network, which learns to reproduce its embeddings.

MobileSAM was made in this way (arXiv 2306.14289, section 3.2). Only embeddings are compared. The decoder is the teacher's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flapsam.run.config import RANDOM, Backbone
from flapsam.sam import Sam, architecture, build, fuse, load_checkpoint, read_checkpoint
from flapsam.sam.checkpoints import find_checkpoint, warm_masks
from flapsam.sam.families import to_own_names
from flapsam.sam.sources import source


class Teacher:
    """A frozen network whose embedding has as many tokens as the student's, and the layer that compares the two."""

    def __init__(self, name: str, student: Sam) -> None:
        """Load the teacher, and let the student's decoder start from the teacher's wherever their shapes agree.

        Args:
            name: the teacher's name in ``flapsam backbone list``.
            student: the network that learns. Its decoder, its masks and its prompt encoder are changed in place.

        Raises:
            FlapsamError: the name is unknown, or the teacher's weights are not on this machine.
        """
        known = source(name)
        checkpoint = find_checkpoint(Backbone(name=name))
        assert checkpoint != RANDOM
        state = read_checkpoint(checkpoint)
        sizes = architecture(known.architecture)
        tokens = student.sizes.tokens(student.image_size)
        teacher = build(sizes, image_size=tokens * sizes.stride, classes=1, pixels=known.pixels)
        load_checkpoint(teacher, state, str(checkpoint))
        self.network = fuse(teacher)
        self.width = sizes.decoder_width
        # Without a bias, the layer cannot answer with the mean embedding alone.
        self.compared = nn.Conv2d(student.sizes.decoder_width, self.width, 1, bias=False)
        with torch.no_grad():
            nn.init.eye_(self.compared.weight[:, :, 0, 0])
            own, shapes = student.state_dict(), to_own_names(state)
            for tensor_name, tensor in shapes.items():
                shared = tensor_name.startswith(("mask_decoder.", "prompt_encoder."))
                if shared and tensor_name in own and own[tensor_name].shape == tensor.shape:
                    own[tensor_name].copy_(tensor)
        warm_masks(student, state)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """The teacher's embedding (batch, width, tokens, tokens) of the middle slices of scenes (batch, 3, size, size)."""
        side = self.network.image_size
        grey = F.interpolate(images[:, 1:2], (side, side), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        return self.network.embed(grey)[:, : self.width]

    def loss(self, embedding: Tensor, images: Tensor) -> Tensor:
        """Mean squared difference between the student's embedding, through the comparing layer, and the teacher's.

        The teacher's channels are normalised, so a loss of 1 is that of an answer with nothing in it.

        Args:
            embedding: the student's embedding of the images. Finer features in further channels are left out.
            images: the scenes (batch, 3, size, size).
        """
        target = self.embed(images).clone()
        target = F.layer_norm(target.permute(0, 2, 3, 1), (self.width,)).permute(0, 3, 1, 2)
        return F.mse_loss(self.compared(embedding[:, : self.compared.in_channels]), target)
