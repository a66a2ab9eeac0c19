"""Images of any size and shape as a ViT takes them, and what it makes of each."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ...data.decode import UnreadableImage
from ..attention_maps import cls_attention, patch_features
from ..frozen import FrozenBackbone
from ..images import to_tensor

MOST_PATCHES = 2**14  # the attention of 6 heads is 6 GiB in fp32 then


@dataclass(frozen=True)
class WholePatches:
    """What is done to an image of any size: bilinear to `size`, then cropped at the right and the
    bottom to whole patches, as in the official visualize_attention.py.

    size: of the shorter side, or height and width, in pixels.
    """

    size: tuple[int, ...]
    patch: int

    def sides(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(w, h) resized and (w, h) cropped. Raises `UnreadableImage` for too many patches."""
        if len(self.size) == 2:
            h, w = self.size
        else:
            short = self.size[0]
            other = int(short * max(width, height) / min(width, height))
            w, h = (short, other) if width <= height else (other, short)
        columns, rows = w // self.patch, h // self.patch
        if rows * columns > MOST_PATCHES:
            raise UnreadableImage(f"{rows} x {columns} patches, more than {MOST_PATCHES:,}")
        return (w, h), (columns * self.patch, rows * self.patch)

    def image(self, image: Image.Image) -> Image.Image:
        """RGB, as the network sees it."""
        return self._resized(image, Image.Resampling.BILINEAR)

    def mask(self, mask: Image.Image) -> Image.Image:
        """Likewise, by nearest neighbors."""
        return self._resized(mask, Image.Resampling.NEAREST)

    def shown(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The part of an image that the network sees, at `size` (w, h)."""
        (w, h), (cropped_w, cropped_h) = self.sides(*image.size)
        box = (0, 0, image.width * cropped_w / w, image.height * cropped_h / h)
        return image.resize(size, Image.Resampling.BICUBIC, box)

    def _resized(self, image: Image.Image, how: Image.Resampling) -> Image.Image:
        resized, (w, h) = self.sides(*image.size)
        return image.resize(resized, how).crop((0, 0, w, h))


@dataclass(frozen=True)
class Seen:
    """attention: of CLS in the last block, (H, rows, columns). features: of the last block's
    patches, (rows, columns, D). Both fp32 on the CPU."""

    attention: Tensor
    features: Tensor


def see(frozen: FrozenBackbone, image: Image.Image, whole: WholePatches) -> Seen:
    """What a backbone makes of an RGB image. Raises `UnreadableImage` for too many patches."""
    transform = frozen.transform
    pixels = to_tensor(whole.image(image), transform.mean, transform.std)[None].to(frozen.device)
    attention = cls_attention(frozen.module, pixels)[0]
    return Seen(attention.cpu(), patch_features(frozen.module, pixels)[0].cpu())
