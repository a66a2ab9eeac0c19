"""A data set of the caller's own as a source: any map-style `torch.utils.data.Dataset`, list, or
`datasets.Dataset` of Hugging Face, whose items are images in one of many forms."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from dinofast.data.dataset import ImageDataset
from dinofast.data.decode import (
    BadFiles,
    UnreadableImage,
    bits_of,
    decode,
    read_file,
    rgb,
    unreadable,
    upright,
)
from dinofast.data.reader import ImageReader
from dinofast.runtime.words import a_kind

KEYS = ("image", "img", "pixel_values", "images", "jpg", "png", "webp", "x")
# an image as crops are made of it: RGB of 8 bits, or float32 (H, W, C) in [0, 1]
Pixels = Image.Image | np.ndarray


class MapStyle(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class ItemDataset:
    """The images of such a data set, with what `dataset.ImageDataset` has.

    An item is an image, a tuple that begins with one, or a dict that has one under one of KEYS (or
    one value alone). Raises `ValueError` for what has no length or no items.
    """

    items: MapStyle
    fingerprint: str = ""
    bad_files: BadFiles = field(default_factory=list)
    ignored: str = ""

    def __post_init__(self) -> None:
        kind = type(self.items)
        # torch's has a __getitem__ that only raises
        is_stream = isinstance(self.items, IterableDataset)
        if is_stream or not hasattr(kind, "__len__") or not hasattr(kind, "__getitem__"):
            raise ValueError(
                f"the data set is {a_kind(self.items)}: give one with __len__ and __getitem__, "
                "such as a torch.utils.data.Dataset, a list, or a datasets.Dataset."
            )
        if isinstance(self.items, Mapping | str):
            names = ", ".join(map(str, self.items)) if isinstance(self.items, Mapping) else ""
            raise ValueError(
                f"the data set is {a_kind(self.items)}{f' with {names}' if names else ''}: give "
                "one data set, whose items are images."
            )
        if not len(self.items):
            raise ValueError("the data set is empty: give one with images.")
        own = getattr(self.items, "_fingerprint", "")  # of a datasets.Dataset: of its contents
        told = f"{kind.__module__}.{kind.__qualname__} {len(self.items)} {own}"
        digest = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        object.__setattr__(self, "fingerprint", digest)

    def __len__(self) -> int:
        return len(self.items)

    def path(self, i: int) -> str:
        return f"item {i}"

    def is_file(self, i: int) -> bool:
        return False

    def read(self, i: int) -> Any:
        """What stands for the image in item i. Raises `UnreadableImage` with what getting it
        raised."""
        with unreadable():
            return image_in(self.items[i])


class ItemReader(ImageReader):
    """Images of an `ItemDataset`: RGB of 8 bits, or, unless three channels have 8 bits, arrays."""

    def __init__(
        self,
        dataset: ItemDataset | ImageDataset,
        channels: int = 3,
        value_range: tuple[float, float] | None = None,
        exif: bool = False,
    ) -> None:
        super().__init__(dataset, value_range, exif)  # type: ignore[arg-type]
        self._channels, self._value_range, self._exif = channels, value_range, exif
        self._to_rgb = self._pixels  # type: ignore[assignment]

    def _pixels(self, item: Any) -> Pixels:
        with unreadable():
            return pixels_of(item, self._channels, self._value_range, self._exif)

    def remark(self) -> str:
        return ""


def image_in(item: Any) -> Any:
    """Of a tuple the first, of a dict the value under one of KEYS, or its only one."""
    if isinstance(item, tuple | list) and item:
        return image_in(item[0])
    if isinstance(item, Mapping):
        for key in KEYS:
            if key in item:
                return image_in(item[key])
        if {"bytes", "path"} & item.keys():  # of Hugging Face, not decoded
            return item
        if len(item) == 1:
            return image_in(next(iter(item.values())))
        raise UnreadableImage(
            f"a dict with {', '.join(map(str, item))}: give the image under one of "
            f"{', '.join(KEYS)}"
        )
    return item


def pixels_of(
    image: Any,
    channels: int = 3,
    value_range: tuple[float, float] | None = None,
    exif: bool = False,
) -> Pixels:
    """An image in any form as RGB of 8 bits where it has three channels of 8 bits, else as float32
    (H, W, channels) in [0, 1].

    image: a PIL image; an array (H, W), (H, W, C) or (C, H, W); a tensor (C, H, W) or (H, W); an
    encoded file as bytes; a dict of Hugging Face with `bytes` or `path`. Values are scaled from
    value_range, without one from 0 to the largest of their type; floats are taken as they are,
    within [0, 1]. Raises `UnreadableImage`.
    """
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") else read_file(image["path"])
    if isinstance(image, bytes):
        image = decode(image, value_range, exif) if channels == 3 else upright(image, exif)
    if isinstance(image, Image.Image):
        if channels == 3:
            return rgb(image, value_range)
        image, value_range = _bands(image, channels, value_range)
    shape = tuple(getattr(image, "shape", ()))
    if isinstance(image, torch.Tensor):
        image = image.numpy(force=True)
        image = (
            image.transpose(1, 2, 0) if image.ndim == 3 and _is_first(image, channels) else image
        )
    elif isinstance(image, np.ndarray):
        first = image.ndim == 3 and image.shape[2] != channels and _is_first(image, channels)
        image = image.transpose(1, 2, 0) if first else image
    else:
        raise UnreadableImage(f"{a_kind(image)}, where an image should be")
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or 0 in image.shape:
        raise UnreadableImage(f"an array of shape {image.shape}, where (H, W, C) should be")
    if image.shape[2] == 1 and channels == 3:
        image = image.repeat(3, 2)
    if image.shape[2] != channels:
        raise UnreadableImage(f"an image of shape {shape}, where `in_channels` is {channels}")
    if channels == 3 and image.dtype == np.uint8 and value_range is None:
        return Image.fromarray(np.ascontiguousarray(image))
    return _scaled(image, value_range)


def _bands(
    image: Image.Image, channels: int, value_range: tuple[float, float] | None
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """The values of a PIL image, (H, W) or (H, W, C), and the range of those of more than 8 bits,
    where the file or value_range tells; color as gray where one channel is wanted."""
    if image.mode == "P":
        image = image.convert("RGBA" if channels == 4 else "RGB")
    if channels == 1 and len(image.getbands()) > 1:
        image = image.convert("L")
    if image.mode != "F" and image.mode[0] != "I":
        return np.asarray(image), None
    bits = bits_of(image)
    if value_range is None and bits is not None:
        value_range = 0.0, float(2**bits - 1)
    return np.asarray(image), value_range


def _is_first(image: np.ndarray, channels: int) -> bool:
    """Whether the first axis is that of the channels."""
    return image.shape[0] in (1, channels)


def _scaled(image: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """In [0, 1], float32."""
    kind = image.dtype.kind
    if value_range is not None:
        low, high = value_range
    elif kind in "uib" and image.dtype.itemsize <= 2 and image.min() >= 0:
        low, high = 0.0, 1.0 if kind == "b" else float(np.iinfo(image.dtype).max)
    elif kind == "f":
        low, high = 0.0, 1.0
        least, most = float(np.nanmin(image)), float(np.nanmax(image))
        if least < -1e-3 or most > 1 + 1e-3:
            raise UnreadableImage(
                f"floats from {least:.4g} to {most:.4g}: scale them to [0, 1], or give "
                "`value_range`"
            )
    else:
        least, most = image.min(), image.max()
        raise UnreadableImage(f"values of {image.dtype} from {least} to {most}: give `value_range`")
    scaled = (image.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
