"""The plan carried out with PIL: the yardstick of every other backend, bit for bit what torchvision
does on PIL images.

PIL does the arithmetic; what is fixed here is how it is called. The crop is cut out before it is
resized (torchvision's `resized_crop`): `resize(box=...)` would let pixels outside the box into the
border.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import Dataset

from dinofast.data.augmentation import Augmentation
from dinofast.data.reader import Met
from dinofast.data.sampler import BatchIndices
from dinofast.runtime.memory import share, why_workers_ended


class WorkerDied(RuntimeError):
    """A process that loads data was killed from outside."""


@contextmanager
def explain_killed_workers(output_dir: str | Path) -> Iterator[None]:
    """Turns torch's error, which it raises wherever the main thread happens to be, into
    `WorkerDied`."""
    try:
        yield
    except RuntimeError as error:
        if not (reason := why_workers_ended(error)):
            raise
        raise WorkerDied(
            f"{reason}: lower `num_workers` or the batch; the same command goes on from what was "
            f"last saved in '{output_dir}'."
        ) from error


class CropDataset(Dataset):
    """Micro-batches by their indices, for a `DataLoader` without batching of its own.

    An item is the uint8 crops, one array (V_r B, 3, S_r, S_r) per resolution, crop-major; the files
    met that gave no image; and how many images were replaced. No crops if no image can be had any
    more. decode(index, met): the RGB image at the index or the next that decodes, and its index.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        decode: Callable[[int, list[Met]], tuple[Image.Image | None, int]],
    ) -> None:
        self._augmentation, self._decode = augmentation, decode

    def __getitem__(self, batch: BatchIndices) -> tuple[list[torch.Tensor], list[Met], int]:
        epoch, indices = batch
        draw = self._augmentation.draw(epoch, indices)
        crops = [
            np.empty((n, len(indices), side, side, 3), np.uint8)
            for n, side in self._augmentation.resolutions
        ]
        out = [view for c in crops for view in c]  # V arrays (B, S, S, 3)
        met: list[Met] = []
        n_replaced = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
            for b, index in enumerate(indices.tolist()):
                image, used = self._decode(index, met)
                if image is None:
                    return [], met, n_replaced
                n_replaced += used != index
                own = (
                    (draw, b)
                    if used == index
                    else (self._augmentation.draw(epoch, np.array([used])), 0)
                )
                for to, view in zip(
                    out, own[0].plan(own[1], image.height, image.width), strict=True
                ):
                    to[b] = render(image, view)
        made = [torch.from_numpy(c).flatten(0, 1).permute(0, 3, 1, 2) for c in crops]
        share(made)
        return made, met, n_replaced


def render(image: Image.Image, view: np.void) -> np.ndarray:
    """One crop of an RGB image by one element of the plan (`augmentation.VIEW`): uint8 (size, size,
    3)."""
    crop = cut(image, view["box"].tolist(), int(view["size"]))
    if view["flip"]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view["jitter"]:
        crop = jitter(crop, view["order"].tolist(), view["factors"].tolist())
    if view["gray"]:
        crop = crop.convert("L").convert("RGB")
    if view["blur_radius"] > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(float(view["blur_radius"])))
    if view["solarize"]:
        crop = ImageOps.solarize(crop, 128)
    return np.asarray(crop)


def cut(image: Image.Image, box: list[int], size: int) -> Image.Image:
    """The box (y, x, height, width), resized to a square by PIL's antialiased bicubic."""
    y, x, h, w = box
    return image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)


def jitter(image: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    """Brightness 0, contrast 1, saturation 2 and hue 3 in the given order, each with its factor."""
    for operation in order:
        image = _COLOR[operation](image, factors[operation])
    return image


def _hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by this share of the circle, in the 8-bit steps of PIL's HSV, rounded toward 0
    as torchvision does."""
    hue, saturation, value = image.convert("HSV").split()
    step = int(turn * 255)
    hue = hue.point([(level + step) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_COLOR = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    _hue,
)
