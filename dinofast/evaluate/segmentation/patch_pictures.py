"""Pictures of what a ViT looks at and what its patches mean: for each image its attention, the part
that most of the attention lies on, and the principal components of its patches as colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..attention_maps import keep_mass, likeness, principal_directions
from ..pictures import enlarge, overlay, sheet, stretch
from .whole_patches import Seen

QUANTILE = 0.02  # of the colors: a component goes from here to 1 - QUANTILE
FOREGROUND = 0.0  # cosine with what CLS looks at, above which a patch is part of the objects
MOST_ROWS = 2**17  # patches from which components are taken


@dataclass(frozen=True)
class PatchColors:
    """The first three principal components of patches as red, green and blue: the same for all
    images and frames. mean (D,), directions (D, 3) fp64; low, high (3,): what is 0 and 1."""

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(seen: Sequence[Seen]) -> PatchColors:
        """Components of the patches that resemble what CLS looks at; of all, where fewer than four
        do."""
        centered = torch.cat([_centered(one.features).flatten(0, 1) for one in seen])
        near = torch.cat([_light(one).flatten() for one in seen]) > FOREGROUND
        rows = centered[near] if near.sum() > 3 else centered
        rows = rows[:: -(-len(rows) // MOST_ROWS)]
        mean, directions = principal_directions(rows)
        projected = (rows.double() - mean) @ directions
        low, high = (torch.quantile(projected, q, dim=0) for q in (QUANTILE, 1 - QUANTILE))
        return PatchColors(mean, directions, low, high)

    def picture(self, seen: Seen, size: tuple[int, int]) -> Tensor:
        """(3, H, W) fp32 in [0, 1]; the less a patch resembles what CLS looks at, the darker."""
        projected = (_centered(seen.features).double() - self.mean) @ self.directions
        colors = (projected - self.low) / (self.high - self.low).clamp(min=1e-12)
        large = enlarge(colors.clamp(0, 1).movedim(-1, 0).float(), size)
        return large * enlarge(_light(seen).clamp(min=0)[None], size)


def _centered(features: Tensor) -> Tensor:
    """Without the image's mean: else images differ more than their patches."""
    return features - features.mean((0, 1))


def _light(seen: Seen) -> Tensor:
    return likeness(seen.features[None], seen.attention.mean(0)[None])[0]


def cells(
    seen: Seen, shown: Tensor, colors: PatchColors, threshold: float, heads: bool
) -> list[tuple[str, Tensor]]:
    """Captions and pictures (3, H, W) of one image: attention, the part that holds `threshold` of
    it, principal components, and with `heads` the attention of each head.

    shown: the image (3, H, W) in [0, 1].
    """
    mean = seen.attention.mean(0)
    found = [
        ("attention", heat(mean, shown)),
        (f"{threshold:.0%} of the attention", cut_out(kept_area(mean, threshold), shown)),
        ("PCA of patches", colors.picture(seen, _size(shown))),
    ]
    if heads:
        found += [
            (f"attention, head {i + 1}", heat(one, shown)) for i, one in enumerate(seen.attention)
        ]
    return found


def heat(attention: Tensor, shown: Tensor) -> Tensor:
    """A map (rows, columns) over the image (3, H, W)."""
    return overlay(shown[None], stretch(enlarge(attention[None], _size(shown))))[0]


def kept_area(attention: Tensor, threshold: float) -> Tensor:
    """The patches that hold this share of a map (rows, columns), bool."""
    return keep_mass(attention.flatten(), threshold).view(attention.shape)


def cut_out(area: Tensor, shown: Tensor) -> Tensor:
    """The image (3, H, W) in color on an area (h, w) bool, nearest-neighbor upsampled, dark and
    gray around it."""
    large = torch.nn.functional.interpolate(area[None, None].float(), _size(shown))[0, 0]
    gray = shown.mean(0, keepdim=True).expand_as(shown) * 0.3
    return torch.where(large > 0.5, shown, gray)


def _size(shown: Tensor) -> tuple[int, int]:
    return shown.shape[-2], shown.shape[-1]


def fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(w, h) scaled so that the longer side is `longest`, at least 1 each."""
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def unit(image: Image.Image) -> Tensor:
    """RGB image -> (3, h, w) fp32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Column:
    """What is shown of an image. name: its own. image: (3, h, w) in [0, 1]. given: the objects of
    its mask cut out, or None. seen: whose cells, "" where there is one backbone, with the captions
    and pictures of `cells`; all of the image's size."""

    name: str
    image: Tensor
    given: Tensor | None
    seen: list[tuple[str, list[tuple[str, Tensor]]]]

    def rows(self) -> list[tuple[str, Tensor]]:
        """Everything, with captions, in the order of a contact sheet."""
        own = [("image", self.image)]
        own += [("its mask", self.given)] if self.given is not None else []
        by_kind = zip(*(found for _, found in self.seen), strict=False)
        names = [f", {whose}" if whose else "" for whose, _ in self.seen]
        return own + [
            (caption + name, picture)
            for kind in by_kind
            for name, (caption, picture) in zip(names, kind, strict=True)
        ]

    def grid(self) -> tuple[list[str], list[tuple[str, Tensor]]]:
        """Captions of the columns, and for each backbone a row (n, 3, h, w): the image, its mask if
        there is one, and the cells."""
        own = [("image", self.image)]
        own += [("its mask", self.given)] if self.given is not None else []
        rows = [
            (whose, torch.stack([picture for _, picture in own + found]))
            for whose, found in self.seen
        ]
        return [caption for caption, _ in own + self.seen[0][1]], rows


def contact_sheet(columns: Sequence[Column], across: int = 6) -> Image.Image:
    """A sheet with an image a column and a caption a row, at most `across` images wide; those that
    are more go on below, as many in each block as can be."""
    blocks = []
    across = -(-len(columns) // -(-len(columns) // across))
    w = max(column.image.shape[-1] for column in columns)
    for start in range(0, len(columns), across):
        block = columns[start : start + across]
        h = max(column.image.shape[-2] for column in block)
        shown = [dict(column.rows()) for column in block]
        rows = [
            (caption, torch.stack([_padded(cells.get(caption), (h, w)) for cells in shown]))
            for caption in max(shown, key=len)
        ]
        names = [_short(column.name) for column in block]
        blocks.append(sheet(rows, heads=names, caption_width=120))
    whole = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for picture in blocks:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def _padded(cell: Tensor | None, size: tuple[int, int]) -> Tensor:
    """A cell in the middle of white, white alone where there is none."""
    canvas = torch.ones(3, *size)
    if cell is not None:
        h, w = _size(cell)
        top, left = (size[0] - h) // 2, (size[1] - w) // 2
        canvas[:, top : top + h, left : left + w] = cell
    return canvas


def _short(name: str, most: int = 28) -> str:
    """The end of a name."""
    name = name.rpartition("/")[2]
    return name if len(name) <= most else f"…{name[1 - most :]}"


def single(column: Column) -> Image.Image:
    """A captioned sheet of one image, a row for each backbone; its sides are even, as encoders of
    videos want them."""
    above, rows = column.grid()
    narrow = max(len(whose) for whose, _ in rows) * 9
    picture = sheet(rows, heads=above, caption_width=max(1, min(120, narrow)))
    even = Image.new("RGB", [side + side % 2 for side in picture.size], "white")
    even.paste(picture)
    return even
