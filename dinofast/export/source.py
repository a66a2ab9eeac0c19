"""What is exported: a trained backbone, and how images are prepared for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import arguments, load_backbone
from ..checkpoint.weights import VIT_OF_WIDTH, check_rgb
from ..config import Config
from ..nn.features import features
from ..nn.vit import VisionTransformer

CROP_PCT = 224 / 256  # of the official evaluation: the crop's side, over the resized shorter side


@dataclass(frozen=True)
class Source:
    """module: images (B, 3, h, w) -> (B, D), in eval mode, fp32, on the CPU. arch: as in `Config`.
    side: of the images that it is exported for, the size of its learned positions if it is one of
    our ViTs. value_range, exif: how files were decoded in training."""

    module: nn.Module
    arch: str
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[float, ...] = (0, 0)
    exif: bool = False

    @property
    def vit(self) -> VisionTransformer | None:
        return self.module if isinstance(self.module, VisionTransformer) else None

    @property
    def patch(self) -> int:
        """Side of a patch; 1 for backbones that are not our ViTs."""
        return self.vit.patch_embed.patch_size if self.vit else 1

    @property
    def resize(self) -> int:
        """Shorter side before the center crop."""
        return round(self.side / CROP_PCT)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return features(self.module, images)

    def preparation(self) -> str:
        """What is done to images, in words."""
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return (
            f"images: (B, 3, {self.side}, {self.side}) fp32, RGB in [0, 1], minus ({mean}), over "
            f"({std})"
        )


class Pooled(nn.Module):
    """A backbone with its features pooled as in training: images (B, 3, h, w) -> (B, D)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return features(self.backbone, images)


def traceable(source: Source) -> nn.Module:
    """The module as tracers and exporters take it."""
    return source.vit or Pooled(source.module).eval()


def load_source(
    path: str | Path,
    key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    image_size: int | None = None,
) -> Source:
    """The backbone of `checkpoint.load_backbone(path, key, arch, patch_size)`.

    image_size: default the side of the global crops in training, 224 where neither the checkpoint
    nor its learned positions tell. Positions of another are resampled once and for all. Raises
    `ValueError` for weights that do not fit, and for a size that cannot be.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"`image_size` is {image_size}: it must be at least 1.")
    trained_with = arguments(path)
    module = load_backbone(path, key, arch, patch_size)
    check_rgb(path, module, trained_with)
    name = arch or trained_with.get("arch") or "backbone"
    side = image_size or trained_with.get("global_crops_size") or 224
    if isinstance(module, VisionTransformer):
        name, patch = VIT_OF_WIDTH[module.embed_dim], module.patch_embed.patch_size
        side = image_size or module.grid * patch
        if side % patch:
            near = max(round(side / patch), 1) * patch
            raise ValueError(
                f"`image_size` {side} is not a multiple of the patch size {patch}: take {near}."
            )
        _for_side(module, side)
    return Source(
        module,
        name,
        side,
        tuple(trained_with.get("image_mean", Config.image_mean)),
        tuple(trained_with.get("image_std", Config.image_std)),
        tuple(trained_with.get("value_range", (0, 0))),
        bool(trained_with.get("exif", False)),
    )


@torch.no_grad()
def _for_side(vit: VisionTransformer, side: int) -> None:
    """Give a ViT the positions for images of this side as its learned ones."""
    matrix = vit.patchify(torch.zeros(1, 3, side, side)).resampling[0]
    if matrix is not None:
        vit.pos_embed = nn.Parameter(vit.positions(matrix)[None])
        vit.grid = side // vit.patch_embed.patch_size
