"""What a ViT looks at and what its patches mean, as maps and as numbers.

The attention of the CLS token in the last block is figure 3 of DINO (arXiv 2104.14294), the
principal components of patch features figure 1 of DINOv2 (arXiv 2304.07193). Both take images of
any size that is whole patches: the learned positions are interpolated, so that larger images give
finer maps than the network was trained with, as in the pictures of both papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pictures import enlarge


@torch.no_grad()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the CLS token to the patches in the last block.

    images: normalized (B, 3, H, W), H and W multiples of the patch size. Returns (B, heads, rows,
    columns) fp32; with what CLS gives to itself, a head sums to 1. Raises ValueError for a backbone
    without attention and for sizes that are not whole patches.
    """
    look: Callable[[Tensor], Tensor] | None = getattr(backbone, "get_last_selfattention", None)
    if look is None:
        raise ValueError(f"A {type(backbone).__name__} has no attention to show: choose a ViT.")
    attention = look(images)[:, :, 0, 1:].float()  # (B, heads, patches)
    return attention.unflatten(-1, _grid(images, attention.shape[-1]))


def attention_maps(
    backbone: nn.Module,
    images: Tensor,
    keep: float | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """`cls_attention` at the images' size, or smoothly upsampled to `size`.

    images: normalized (B, 3, H, W), H and W multiples of the patch size. Returns (B, heads, H, W)
    fp32, every patch repeated over its pixels; with `size` (H', W'), bicubic between the middles of
    the patches. With `keep`, such as 0.6, 1 on the patches that hold this share of the attention
    and 0 elsewhere. Raises ValueError as `cls_attention` does.
    """
    grid = cls_attention(backbone, images)
    if keep is not None:
        grid = keep_mass(grid.flatten(-2), keep).float().view(grid.shape)
    if size is not None:
        return enlarge(grid, size)
    patch = images.shape[-1] // grid.shape[-1]
    return grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def dense_attention_maps(backbone: nn.Module, images: Tensor, patch_size: int) -> Tensor:
    """`attention_maps` finer than patches: the mean over all patch_size ** 2 shifts of the patches'
    borders.

    images: normalized (B, 3, H, W), H and W multiples of patch_size; past their right and lower
    borders the last pixels are repeated. Each pixel takes the mean of the patches that cover it,
    one a shift. Returns (B, heads, H, W) fp32.
    """
    h, w = images.shape[-2:]
    wider = F.pad(images, (0, patch_size, 0, patch_size), mode="replicate")
    total: Tensor | int = 0
    covered = torch.zeros(h + patch_size, w + patch_size, device=images.device)
    for y in range(patch_size):
        for x in range(patch_size):
            maps = attention_maps(backbone, wider[..., y : y + h, x : x + w])
            total = total + F.pad(maps, (x, patch_size - x, y, patch_size - y))
            covered[y : y + h, x : x + w] += 1
    return (total / covered.clamp(min=1))[..., :h, :w]


def keep_mass(attention: Tensor, share: float = 0.6) -> Tensor:
    """Which of the last axis's entries hold `share` of its sum, taking the largest first; bool,
    same shape.

    The smallest entries are dropped while together they are at most 1 - share, so what is kept is
    never less than `share`.
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"The share of attention to keep is {share}: give a number above 0 and up to 1."
        )
    value, order = attention.sort(dim=-1, stable=True)
    dropped = (value / value.sum(-1, keepdim=True)).cumsum(-1) <= 1 - share
    return torch.zeros_like(dropped).scatter(-1, order, ~dropped)


def mass_on_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's attention that lies on the object: maps (B, heads, H, W), masks (B, H, W)
    in [0, 1] -> (B, heads)."""
    return (maps * masks[:, None]).sum((-2, -1)) / maps.sum((-2, -1))


@torch.no_grad()
def patch_features(backbone: nn.Module, images: Tensor, layer: int = 1) -> Tensor:
    """Normalized output of a block for each patch: images (B, 3, H, W) -> (B, rows, columns, D)
    fp32.

    layer: 1 for the last block, 2 for the one before it. Raises ValueError as `cls_attention` does.
    """
    layers: Callable[[Tensor, int], list[Tensor]] | None = getattr(
        backbone, "get_intermediate_layers", None
    )
    if layers is None:
        raise ValueError(
            f"A {type(backbone).__name__} has no patch features to show: choose a ViT."
        )
    features = layers(images, layer)[0][:, 1:].float()  # (B, patches, D)
    return features.unflatten(1, _grid(images, features.shape[1]))


def principal_components(features: Tensor, k: int = 3) -> Tensor:
    """The first k principal components of the rows: (N, D) any float dtype -> (N, k) fp32, largest
    variance first.

    A component's sign is arbitrary in itself; here its direction's largest entry is positive, so
    that pictures repeat. Components past the rank are 0.
    """
    mean, directions = principal_directions(features, k)
    return ((features.double() - mean) @ directions).float()


def principal_directions(features: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the first k principal directions (D, k) of the rows (N, D), fp64; signs and
    those past the rank as in `principal_components`."""
    mean = features.double().mean(0)
    centered = features.double() - mean
    variance, directions = torch.linalg.eigh(centered.t() @ centered)  # ascending
    directions = directions.flip(1)[:, :k] * (
        variance.flip(0)[:k] > 1e-10 * variance[-1].clamp(min=1e-300)
    )
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, directions * largest.sign()


def pca_colors(
    features: Tensor, foreground: Tensor | None = None, quantile: float = 0.02
) -> Tensor:
    """The first three principal components over the patches of all images, as red, green and blue.

    features (B, rows, columns, D); foreground (B, rows, columns) bool: the patches to take
    components from, default all. Each component goes from its `quantile` (0) to its 1 - `quantile`
    (1) over these. Returns (B, 3, rows, columns) fp32 in [0, 1], 0 (black) outside of the
    foreground.
    """
    if foreground is None:
        foreground = torch.ones(features.shape[:3], dtype=torch.bool, device=features.device)
    components = principal_components(features[foreground])
    low, high = (torch.quantile(components, q, dim=0) for q in (quantile, 1 - quantile))
    colors = torch.zeros(*features.shape[:3], 3, device=features.device)
    colors[foreground] = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.movedim(-1, 1)


def likeness(features: Tensor, attention: Tensor) -> Tensor:
    """How much each patch resembles those that the image's CLS token looks at, as a cosine.

    features (B, rows, columns, D); attention (B, rows, columns) of any scale, such as the mean of
    `cls_attention` over heads. The image's mean is taken from the patches and from their mean
    weighted by attention. Returns (B, rows, columns) fp32 in [-1, 1].
    """
    centered = features.float() - features.float().mean((1, 2), keepdim=True)
    weights = attention / attention.sum((1, 2), keepdim=True)
    attended = (weights[..., None] * centered).sum((1, 2), keepdim=True)
    return F.cosine_similarity(centered, attended, dim=-1)


def _grid(images: Tensor, n_patches: int) -> tuple[int, int]:
    """Rows and columns of the square patches that the images are made of."""
    h, w = images.shape[-2:]
    patch = math.isqrt(h * w // n_patches)
    if h % patch or w % patch or (h // patch) * (w // patch) != n_patches:
        raise ValueError(
            f"Images of {h} x {w} pixels are not whole patches: crop them to multiples of the "
            "patch size."
        )
    return h // patch, w // patch
