"""The whole network: from images to one logit map per class and one for the background, without prompts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamPromptEncoder

from flapsam.sam.architecture import Architecture
from flapsam.sam.autocast import full_precision
from flapsam.sam.decoder import MaskDecoder
from flapsam.sam.slice_adapters import Stack, reach

PIXELS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "paper": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "sam": ((123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)),
}
"""Input normalisation: mean and standard deviation of the three channels, for pixels in [0, 1]."""


class Sam(nn.Module):
    """Segment Anything without prompts, for ``masks`` classes including the background (FLAP-SAM, arXiv 2407.21739)."""

    def __init__(self, sizes: Architecture, *, image_size: int, masks: int, pixels: str = "paper") -> None:
        super().__init__()
        self.sizes = sizes
        self.image_size = image_size
        self.masks = masks
        self.personal: frozenset[str] = frozenset()
        """Public names of the parameters that a site trains for itself and that never travel."""
        self.fused = False
        """Whether the network can only predict, and stays as it is."""
        self.stack = Stack()
        self.vision_encoder: Any = sizes.encoder(image_size)
        self.prompt_encoder = _prompt_encoder(sizes, image_size)
        self.mask_decoder: MaskDecoder = sizes.decoder(masks)
        mean, deviation = PIXELS[pixels]
        self.pixel_mean: Tensor
        self.pixel_deviation: Tensor
        self.register_buffer("pixel_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_deviation", torch.tensor(deviation)[:, None, None], persistent=False)

    def embed(self, images: Tensor, depth: int | None = None) -> Tensor:
        """Encode images (batch, 3, size, size) in [0, 1] as an embedding (batch, channels, tokens, tokens).

        Args:
            images: the images.
            depth: number of consecutive slices of a volume that follow one another; the whole batch if None. It matters only
                where slices meet (``reach``).
        """
        self.stack.slices, self.stack.depth = images.shape[0], depth or images.shape[0]
        return self.vision_encoder((images - self.pixel_mean) / self.pixel_deviation)

    def decode(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Decode an embedding into logits (batch, masks, size, size) and predicted IoU (batch, masks)."""
        prompt = self.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        logits, iou = self.mask_decoder(embedding, self.positions(), prompt)
        if logits.shape[-1] != self.image_size:
            logits = enlarged(logits, self.image_size)
        return logits, iou

    def logits(self, embedding: Tensor) -> Tensor:
        """Decode an embedding into logits (batch, masks, size, size) alone."""
        return self.decode(embedding)[0]

    def forward(self, images: Tensor, depth: int | None = None) -> Tensor:
        """Segment images (batch, 1 or 3, size, size) in [0, 1] into logits (batch, masks, size, size). Grey is repeated."""
        return self.logits(self.embed(images.expand(-1, 3, -1, -1), depth))

    @property
    def reach(self) -> int:
        """Number of slices on either side that a slice's logits depend on."""
        return reach(self.vision_encoder)

    def positions(self) -> Tensor:
        """The dense position encoding of the tokens' centres (1, decoder width, tokens, tokens)."""
        tokens = self.sizes.tokens(self.image_size)
        centres = (torch.arange(tokens, device=self.pixel_mean.device) + 0.5) / tokens
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.prompt_encoder.shared_embedding(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]


def enlarged(logits: Tensor, size: int) -> Tensor:
    """Resize logits (batch, masks, height, width) bilinearly to a square."""
    if logits.device.type == "cpu" or not logits.requires_grad:
        return F.interpolate(logits, (size, size), mode="bilinear")
    return enlarged_by_products(logits, size)


def enlarged_by_products(logits: Tensor, size: int) -> Tensor:
    """The same as two products. On a GPU, the gradient of PyTorch's own is deterministic only by sorting all pixels."""
    down, across = (
        F.interpolate(torch.eye(side, device=logits.device)[None], size, mode="linear")[0] for side in logits.shape[-2:]
    )
    with full_precision(logits.device):
        return down.T @ logits.float() @ across


def _prompt_encoder(sizes: Architecture, image_size: int) -> SamPromptEncoder:
    """Build SAM's prompt encoder. Its random position matrix is a buffer as in SAM, not a parameter as in transformers."""
    config = SamConfig(
        vision_config=SamVisionConfig(num_pos_feats=sizes.decoder_width // 2, hidden_size=sizes.decoder_width),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=sizes.decoder_width, image_size=image_size, patch_size=sizes.stride
        ),
    )
    encoder = SamPromptEncoder(config)
    code = encoder.shared_embedding
    matrix = torch.randn_like(code.positional_embedding)
    del code.positional_embedding
    code.register_buffer("positional_embedding", matrix)
    return encoder


def build(sizes: Architecture, *, image_size: int, classes: int, pixels: str = "paper", seed: int = 0) -> Sam:
    """Build a network with random weights that depend only on ``seed``.

    Linear layers, convolutions and norms have PyTorch's default initialisation, as in Meta's code. Position embeddings of
    the patches, where a backbone has them, are drawn from a normal distribution with standard deviation 0.02. Relative
    positions and biases of attention start at zero.

    Args:
        sizes: the architecture.
        image_size: side of the square input in pixels, a multiple of ``sizes.multiple``.
        classes: number of classes, without the background.
        pixels: name of the input normalisation in ``PIXELS``.
        seed: seed of the random weights. The global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Sam(sizes, image_size=image_size, masks=classes + 1, pixels=pixels)
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()
        if isinstance(positions := getattr(network.vision_encoder, "pos_embed", None), nn.Parameter):
            nn.init.normal_(positions, std=0.02)
    return network
