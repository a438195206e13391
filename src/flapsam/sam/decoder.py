"""SAM's mask decoder with one mask per class, and upscaling towards the input's resolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamLayerNorm, SamTwoWayTransformer

from flapsam.sam.architecture import Architecture


class Mlp(nn.Module):
    """Three linear layers with ReLU in between."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width_in, width), nn.Linear(width, width), nn.Linear(width, width_out)])

    def forward(self, features: Tensor) -> Tensor:
        """Transform the last dimension."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(features)))))


class Output(nn.Module):
    """The decoder's output part, all of which FLAP-SAM trains: mask tokens, upscaling and hypernetworks.

    It is a single module, so that PEFT can save it with ``modules_to_save=["output"]``.
    """

    def __init__(self, sizes: Architecture, masks: int) -> None:
        super().__init__()
        width = sizes.decoder_width
        self.mask_tokens = nn.Embedding(masks, width)
        layers: list[nn.Module] = []
        for step, (narrow, wide) in enumerate(zip(sizes.upscaling, (width, *sizes.upscaling), strict=False)):
            layers.append(nn.ConvTranspose2d(wide, narrow, kernel_size=2, stride=2))
            if step < len(sizes.upscaling) - 1:
                layers.append(SamLayerNorm(narrow, data_format="channels_first"))
            layers.append(nn.GELU())
        self.upscaling = nn.Sequential(*layers)
        self.hypernetworks = nn.ModuleList(Mlp(width, width, sizes.upscaling[-1]) for _ in range(masks))

    def forward(self, mask_tokens: Tensor, grid: Tensor, finer: Sequence[Tensor] = ()) -> Tensor:
        """Compute logits from the transformer's outputs.

        Args:
            mask_tokens: the transformed mask tokens (batch, masks, width).
            grid: the transformed image embedding (batch, width, tokens, tokens).
            finer: the image at the resolution of the first upsampling steps, to be added to their results, coarsest first.

        Returns:
            Logits (batch, masks, height, width), where every upsampling step doubles the grid's height and width.
        """
        steps = iter(finer)
        for layer in self.upscaling:
            grid = layer(grid)
            if isinstance(layer, nn.ConvTranspose2d) and (features := next(steps, None)) is not None:
                grid = grid + features
        filters = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.hypernetworks)], dim=1)
        return torch.einsum("bmc,bchw->bmhw", filters, grid)


class MaskDecoder(nn.Module):
    """Two-way transformer between tokens (one for the IoU, then one per mask) and the image. It returns all masks."""

    def __init__(self, sizes: Architecture, masks: int) -> None:
        super().__init__()
        width = sizes.decoder_width
        config = SamMaskDecoderConfig(
            hidden_size=width,
            mlp_dim=sizes.decoder_mlp,
            num_attention_heads=sizes.decoder_heads,
            layer_norm_eps=1e-5,  # SAM's value, unlike the default of transformers
        )
        config._attn_implementation = "sdpa"
        self.masks = masks
        self.iou_token = nn.Embedding(1, width)
        self.transformer = SamTwoWayTransformer(config)
        self.iou_prediction_head = Mlp(width, sizes.iou_width, masks)
        self.output = Output(sizes, masks)

    def forward(
        self, embedding: Tensor, positions: Tensor, prompt: Tensor, points: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode an image embedding.

        Args:
            embedding: the image encoder's output (batch, width, tokens, tokens).
            positions: the dense position encoding (1, width, tokens, tokens).
            prompt: the dense prompt embedding (1, width, 1, 1).
            points: the embeddings of points and boxes (1, points, width); None without prompts.

        Returns:
            Logits (batch, masks, upscaled tokens, upscaled tokens) and predicted IoU (batch, masks).
        """
        tokens = torch.cat([self.iou_token.weight, self.output.mask_tokens.weight])
        queries, grid = self.transform(tokens, embedding + prompt, positions, points)
        return self.output(queries[:, 1 : 1 + self.masks], grid), self.iou_prediction_head(queries[:, 0])

    def transform(self, tokens: Tensor, grid: Tensor, positions: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """Let the tokens (tokens, width) and points attend to the image (batch, channels, height, width), and it to them.

        Returns:
            The transformed tokens (batch, tokens and points, width), and the image in its own shape.
        """
        batch, _, height, width = grid.shape
        if points is not None:
            tokens = torch.cat([tokens, points[0]])
        queries, keys = self.transformer(
            point_embeddings=tokens.expand(batch, 1, -1, -1),
            image_embeddings=grid,
            image_positional_embeddings=positions,
            attention_similarity=None,
        )
        return queries.squeeze(1), keys.squeeze(1).transpose(1, 2).unflatten(2, (height, width))
