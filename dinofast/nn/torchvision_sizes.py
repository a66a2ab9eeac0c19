"""torchvision's ViT and MaxViT for images of any size: as built, they take one. At that size they
give what they gave, and their weights keep their names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import maxvit, vision_transformer


def any_size(model: nn.Module) -> None:
    """Let a `VisionTransformer` or `MaxVit` of torchvision take other sizes from now on."""
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]


class AnySizeViT(vision_transformer.VisionTransformer):
    """Learned positions are interpolated bicubically, as in the official DINO."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, D)."""
        patches = self.conv_proj(x)  # (B, D, rows, cols)
        tokens = torch.cat(
            (self.class_token.expand(len(x), -1, -1), patches.flatten(2).mT), dim=1
        ) + self.positions(*patches.shape[2:])
        encoder = self.encoder
        return self.heads(encoder.ln(encoder.layers(encoder.dropout(tokens)))[:, 0])

    def positions(self, rows: int, cols: int) -> Tensor:
        table, grid = self.encoder.pos_embedding, self.image_size // self.patch_size
        if (rows, cols) == (grid, grid):
            return table
        square = table[:, 1:].mT.unflatten(2, (grid, grid))
        resampled = F.interpolate(square, size=(rows, cols), mode="bicubic")
        return torch.cat((table[:, :1], resampled.flatten(2).mT), dim=1)


class AnySizePartition(maxvit.PartitionAttentionLayer):
    """Maps that are no multiple of the window are padded with zeros at the right and the bottom, as
    torchvision's Swin does."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        h, w = x.shape[2:]
        by_window = self.partition_type == "window"
        side = self.p if by_window else self.g  # tokens of a window or grid, along an axis
        x = F.pad(x, (0, -w % side, 0, -h % side))
        rows, cols = x.shape[2] // side, x.shape[3] // side
        # a window is `side` neighbors, a grid every rows-th (cols-th) token
        cut = (rows, side, cols, side) if by_window else (side, rows, side, cols)
        at = (0, 2, 4, 3, 5, 1) if by_window else (0, 3, 5, 2, 4, 1)
        parts = x.reshape(*x.shape[:2], *cut).permute(*at)  # (B, rows, cols, side, side, C)
        tokens = parts.flatten(3, 4).flatten(1, 2)
        tokens = tokens + self.stochastic_dropout(self.attn_layer(tokens))
        tokens = tokens + self.stochastic_dropout(self.mlp_layer(tokens))
        parts = tokens.reshape(parts.shape)
        back = (0, 5, 1, 3, 2, 4) if by_window else (0, 5, 3, 1, 4, 2)
        return parts.permute(*back).flatten(4, 5).flatten(2, 3)[:, :, :h, :w]


_CLASSES: dict[type, Any] = {
    vision_transformer.VisionTransformer: AnySizeViT,
    maxvit.PartitionAttentionLayer: AnySizePartition,
}
