"""How well the attention of a ViT segments objects that it was never told of: its share on the
object, and the Jaccard similarity of DINO (arXiv 2104.14294, figure 4).

The paper's protocol, by its author (facebookresearch/dino, issue 54): of each head in the last
block the patches are kept that hold 60 % of the CLS token's attention; for each object of an image
the head counts whose mask has the largest Jaccard similarity with the object's; the mean over the
objects of an image, then over the images of VOC12's validation set.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.decode import read_file, unreadable
from ..attention_maps import keep_mass, mass_on_mask

VOID = 255
MOST_OBJECTS = 64  # gray values that a mask of numbers may have; more are soft edges
VOC = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt")


def jaccard(kept: Tensor, objects: Tensor, void: Tensor | None = None) -> Tensor:
    """Intersection over union of each mask with each object: kept (H, h, w) and objects (K, h, w)
    bool -> (H, K) fp64. void (h, w) bool: pixels that count nowhere. Two empty masks: 1."""
    if void is not None:
        kept, objects = kept & ~void, objects & ~void
    first, second = kept.flatten(1).double(), objects.flatten(1).double()
    both = first @ second.t()
    either = first.sum(1)[:, None] + second.sum(1) - both
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))


@dataclass(frozen=True)
class Objects:
    """masks: (K, h, w) bool, one an object, none of them empty. void: (h, w) bool, ignored."""

    masks: Tensor
    void: Tensor


def objects_of(mask: Image.Image) -> Objects:
    """The objects of a mask by its values.

    Of a palette PNG, as VOC and DAVIS have them: each value above 0 is an object and VOID is
    ignored. Gray or black and white: one object where it is not 0 if there is nothing else than 0
    and 255, and from 128 if there are more than MOST_OBJECTS values (soft edges); else as a
    palette. Color: each color that is not black is an object.
    """
    if mask.mode not in ("P", "L", "1"):
        mask = mask.convert("L") if mask.mode in ("LA", "I", "I;16") else mask.convert("RGB")
    values: np.ndarray = np.asarray(mask).astype(np.int64)
    if values.ndim == 3:
        values = values @ (1 << 16, 1 << 8, 1)
    gray, kinds = mask.mode == "L", set(np.unique(values).tolist())
    void = np.zeros(values.shape, bool)
    if gray and kinds <= {0, VOID}:
        values = values // VOID
    elif gray and len(kinds) > MOST_OBJECTS:
        values = values // 128
    elif mask.mode in ("L", "P"):
        void = values == VOID
        values = np.where(void, 0, values)
    numbers = np.unique(values)
    found = [torch.from_numpy(values == number) for number in numbers[numbers > 0]]
    empty = torch.zeros(0, *values.shape, dtype=torch.bool)
    return Objects(torch.stack(found) if found else empty, torch.from_numpy(void))


def scores(
    attention: Tensor, objects: Objects, patch: int, threshold: float = 0.6
) -> dict[str, float]:
    """Of one image: shares of 1.

    attention (H, rows, columns); objects at the size of the patches, or less. `jaccard`: of each
    object its best head, mean over objects. `jaccard_foreground`: the best head of all objects
    together. `attention_on_object`: mean over heads; `attention_best_head`; `object_area`, what
    attention alike everywhere would give.
    """
    masks, void = objects.masks, objects.void
    kept = keep_mass(attention.flatten(1), threshold).view(attention.shape)
    foreground = masks.any(0)
    h, w = void.shape
    maps = _repeated(attention, patch)[:, :h, :w] * ~void
    on_object = mass_on_mask(maps[None], foreground[None].float())[0]
    kept = _repeated(kept, patch)[:, :h, :w]
    return {
        "jaccard": jaccard(kept, masks, void).amax(0).mean().item(),
        "jaccard_foreground": jaccard(kept, foreground[None], void).amax().item(),
        "attention_on_object": on_object.mean().item(),
        "attention_best_head": on_object.amax().item(),
        "object_area": (foreground.sum() / (~void).sum().clamp(min=1)).item(),
    }


def _repeated(maps: Tensor, patch: int) -> Tensor:
    """(H, rows, columns) -> (H, h, w), every patch over its pixels."""
    return maps.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def read_mask(folder: str | Path, image_path: str) -> Image.Image | None:
    """The PNG that an image has below a folder of masks: under as much of its own path as there is,
    val/cat/1.png before 1.png; None if there is none. Raises `UnreadableImage`."""
    parts = [part for part in Path(image_path).with_suffix(".png").parts if part not in "/.."]
    for start in range(len(parts)):
        path = Path(folder, *parts[start:])
        if path.is_file() and path.resolve() != Path(image_path).resolve():
            data = read_file(path)
            with unreadable():
                mask = Image.open(io.BytesIO(data))
                mask.load()
                return mask
    return None


def voc(source: str | Path) -> tuple[list[str], str] | None:
    """The validation images and the folder of masks, where `source` has PASCAL VOC's layout:
    JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/val.txt."""
    root = Path(source)
    if not all((root / part).exists() for part in VOC):
        return None
    images, masks, listed = VOC
    names = (root / listed).read_text().split()
    return [str(root / images / f"{name}.jpg") for name in names], str(root / masks)
