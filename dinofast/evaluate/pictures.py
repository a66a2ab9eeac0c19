"""Pictures of what a backbone has learned: heat maps over images, sheets of captioned rows. Only
Pillow and torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Inferno (matplotlib, CC0) at twelve even steps: lightness grows evenly from black to pale yellow.
HEAT = (
    torch.tensor(
        [
            (0, 0, 4),
            (20, 11, 53),
            (58, 9, 99),
            (96, 19, 110),
            (133, 33, 107),
            (169, 46, 94),
            (203, 65, 73),
            (230, 93, 47),
            (247, 131, 17),
            (252, 173, 18),
            (245, 219, 75),
            (252, 255, 164),
        ]
    )
    / 255
)


def heat_colors(values: Tensor) -> Tensor:
    """Colors of a perceptual map: values (..., H, W) in [0, 1] -> (..., 3, H, W) fp32 in [0, 1],
    dark to light."""
    position = values.float().clamp(0, 1) * (len(HEAT) - 1)
    low = position.floor().long().clamp(max=len(HEAT) - 2)
    table = HEAT.to(values.device)
    colors = torch.lerp(table[low], table[low + 1], (position - low)[..., None])  # (..., H, W, 3)
    return colors.movedim(-1, -3)


def stretch(maps: Tensor, quantile: float = 0.98) -> Tensor:
    """Each map (..., H, W) from its smallest value to its `quantile`, to [0, 1]; a flat map to
    0."""
    flat = maps.float().flatten(-2)
    low = flat.amin(-1, keepdim=True)
    high = flat.quantile(quantile, -1, keepdim=True)
    return ((flat - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).view(maps.shape)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (..., h, w) of any float dtype -> (..., H, W) fp32, smoothly, within the smallest and
    the largest value of each map.

    A patch's value stays at the middle of the patch: cells are areas, not points (align_corners is
    False).
    """
    maps = maps.float()
    large = F.interpolate(
        maps.reshape(-1, 1, *maps.shape[-2:]), size, mode="bicubic", align_corners=False
    )
    low, high = (bound(maps, dim=(-2, -1), keepdim=True) for bound in (torch.amin, torch.amax))
    return large.view(*maps.shape[:-2], *size).clamp(low, high)


def overlay(images: Tensor, heat: Tensor, strength: float = 0.85) -> Tensor:
    """Heat maps over dimmed images.

    images (B, 3, H, W) in [0, 1]; heat (B, H, W) in [0, 1], at the images' size. Where heat is 0
    the image shows, halfway to gray and at 0.6 of its brightness; where it is 1, `strength` of the
    color is the map's. Returns (B, 3, H, W) fp32.
    """
    gray = (images * torch.tensor((0.299, 0.587, 0.114), device=images.device).view(3, 1, 1)).sum(
        1, keepdim=True
    )
    dimmed = 0.6 * torch.lerp(gray.expand_as(images), images, 0.5)
    return torch.lerp(dimmed, heat_colors(heat), strength * heat[:, None].clamp(0, 1))


def sheet(
    rows: Sequence[tuple[str, Tensor]],
    gap: int = 8,
    font_size: int = 15,
    caption_width: int = 100,
    heads: Sequence[str] = (),
) -> Image.Image:
    """A table of pictures: each row is a caption and its cells, RGB (B, 3, H, W) in [0, 1].
    heads: B captions above the columns, if any.

    A caption stands left of its row, in a column of `caption_width` pixels. It is broken into lines
    at spaces until it fits, and set smaller if a word does not. All rows are as high as the cells
    or, if that is more, as the tallest caption.
    """
    n_columns, (h, w) = len(rows[0][1]), rows[0][1].shape[-2:]
    fitted = [fit_caption(caption, caption_width, font_size) for caption, _ in rows]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox
    boxes = [measure((0, 0), *caption, anchor="rm", spacing=2) for caption in fitted]
    height = max(h, *(2 * math.ceil(max(-above, below)) for _, above, _, below in boxes))
    head = gap + caption_width + gap
    above = [fit_caption(caption, w, font_size) for caption in heads]
    boxes = [measure((0, 0), *caption, anchor="ma", spacing=2) for caption in above]
    first = gap + max((math.ceil(bottom) + gap for _, _, _, bottom in boxes), default=0)
    size = head + n_columns * (w + gap), first + len(rows) * (height + gap)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for c, (text, font) in enumerate(above):
        place = head + c * (w + gap) + w / 2, gap
        draw.multiline_text(place, text, "black", font, "ma", align="center", spacing=2)
    for r, ((text, font), (_, cells)) in enumerate(zip(fitted, rows, strict=True)):
        top = first + r * (height + gap)
        middle = head - gap, top + height / 2
        draw.multiline_text(middle, text, "black", font, anchor="rm", align="right", spacing=2)
        pixels = (cells.float().cpu().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        for c, cell in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            picture.paste(Image.fromarray(cell), (head + c * (w + gap), top + (height - h) // 2))
    return picture


def fit_caption(text: str, width: int, font_size: int = 15) -> tuple[str, ImageFont.FreeTypeFont]:
    """The caption with line breaks, and the font in which every line is at most `width` pixels
    wide."""
    for size in range(font_size, 5, -1):
        font = ImageFont.load_default(size)
        lines: list[str] = []
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
        if all(font.getlength(line) <= width for line in lines):
            break
    assert isinstance(font, ImageFont.FreeTypeFont)  # of a given size there is no other
    return "\n".join(lines), font
