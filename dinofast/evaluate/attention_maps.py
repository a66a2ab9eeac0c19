"""What the CLS token looks at in the last block of a ViT, as maps, as numbers and as a picture (arXiv 2104.14294, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

# Colours of a map from 0 to its largest value, dark to light; straight lines between them.
HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], dtype=float)


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: Tensor, keep: float | None = None) -> Tensor:
    """Attention of the CLS token to the patches in the last block, at the images' size.

    images: normalised (B, 3, H, W), H and W multiples of the patch size. Returns (B, heads, H, W) fp32, every patch repeated
    over its pixels; with `keep`, such as 0.6, 1 on the patches that hold this share of the attention and 0 elsewhere.
    Raises ValueError for a backbone without attention and for sizes that are not whole patches.
    """
    if not hasattr(backbone, "get_last_selfattention"):
        raise ValueError(f"A {type(backbone).__name__} has no attention to show: choose a ViT.")
    h, w = images.shape[-2:]
    attention = backbone.get_last_selfattention(images)[:, :, 0, 1:].float()                 # (B, heads, patches)
    patch = math.isqrt(h * w // attention.shape[-1])
    if h % patch or w % patch or (h // patch) * (w // patch) != attention.shape[-1]:
        raise ValueError(f"Images of {h} x {w} pixels are not whole patches: crop them to multiples of the patch size.")
    if keep is not None:
        attention = keep_mass(attention, keep).float()
    grid = attention.unflatten(-1, (h // patch, w // patch))
    return grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def keep_mass(attention: Tensor, share: float = 0.6) -> Tensor:
    """Which of the last axis's entries hold `share` of its sum, taking the largest first; bool, same shape.

    The smallest entries are dropped while together they are at most 1 - share, so what is kept is never less than `share`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share of attention to keep is {share}: give a number above 0 and up to 1.")
    value, order = attention.sort(dim=-1, stable=True)
    dropped = (value / value.sum(-1, keepdim=True)).cumsum(-1) <= 1 - share
    return torch.zeros_like(dropped).scatter(-1, order, ~dropped)


def mass_on_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's attention that lies on the object: maps (B, heads, H, W), masks (B, H, W) in [0, 1] -> (B, heads)."""
    return (maps * masks[:, None]).sum((-2, -1)) / maps.sum((-2, -1))


def picture(columns: Sequence[tuple[str, Tensor]], scale: int = 5, gap: int = 6) -> Image.Image:
    """A table of small images: each column is a caption and its cells, RGB (B, 3, H, W) in [0, 1] or maps (B, H, W).

    Maps run from dark (0) to light (the map's largest value). Pixels are enlarged `scale` times.
    """
    n_rows, (h, w) = len(columns[0][1]), columns[0][1].shape[-2:]
    font, head = ImageFont.load_default(13), 22
    cell_w, cell_h = w * scale + gap, h * scale + gap
    sheet = Image.new("RGB", (len(columns) * cell_w + gap, n_rows * cell_h + gap + head), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (caption, cells) in enumerate(columns):
        draw.text((gap + c * cell_w + w * scale / 2, gap), caption, fill="black", font=font, anchor="ma")
        for r, cell in enumerate(cells.float().cpu().numpy()):
            rgb = cell.transpose(1, 2, 0) * 255 if cell.ndim == 3 else _heat(cell)
            tile = Image.fromarray((rgb.clip(0, 255) + 0.5).astype(np.uint8))
            tile = tile.resize((w * scale, h * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + c * cell_w, gap + head + r * cell_h))
    return sheet


def _heat(values: np.ndarray) -> np.ndarray:
    """(H, W) from 0 up -> colours (H, W, 3) in 0..255."""
    position = values / max(values.max(), 1e-12) * (len(HEAT) - 1)
    return np.stack([np.interp(position, np.arange(len(HEAT)), HEAT[:, channel]) for channel in range(3)], axis=-1)
