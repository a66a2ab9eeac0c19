"""Labeled folders of images and the official evaluation transform, with PIL alone but torchvision's
rounding rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.decode import UnreadableImage, decode, read_file

# those of torchvision's ImageFolder
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HOLD_OUT_EVERY = 4


@dataclass(frozen=True)
class EvalTransform:
    """PIL image -> (3, crop, crop) fp32: shorter side to `resize` (bicubic), center crop, [0, 1],
    minus mean, over std.

    The defaults are the official evaluation. Raises ValueError when the crop is larger than the
    resized image can be.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(
                f"The center crop of {self.crop} pixels does not fit into images whose shorter "
                f"side is resized to {self.resize}: choose a `crop` from 1 to `resize`."
            )

    def __call__(self, image: Image.Image) -> Tensor:
        w, h = image.size
        short, long = min(w, h), max(w, h)
        other = int(self.resize * long / short)
        w, h = (self.resize, other) if w <= h else (other, self.resize)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        left, top = int(round((w - self.crop) / 2)), int(round((h - self.crop) / 2))
        return to_tensor(
            image.crop((left, top, left + self.crop, top + self.crop)), self.mean, self.std
        )


def to_tensor(
    image: Image.Image, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """RGB image -> normalized (3, h, w) fp32."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


@dataclass(frozen=True)
class LabeledImages(Dataset):
    """Images with labels: item i is (i, tensor, None), or (i, None, reason) when the file cannot be
    read."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, str | None]:
        try:
            return i, self.transform(decode(read_file(self.paths[i]))), None
        except (UnreadableImage, ValueError) as error:
            return i, None, str(error)

    def pick(self, rows: Sequence[int]) -> LabeledImages:
        return replace(
            self,
            paths=tuple(self.paths[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
        )

    def batches(
        self, batch_size: int, num_workers: int
    ) -> Iterator[tuple[Tensor, Tensor, list[tuple[Path, str]]]]:
        """In order: images (B, 3, h, w), their rows (B,), and what could not be read in this batch
        as (path, reason)."""
        for rows in DataLoader(self, batch_size, num_workers=num_workers, collate_fn=list):
            good = [(i, image) for i, image, _ in rows if image is not None]
            bad_files = [(self.paths[i], reason) for i, _, reason in rows if reason is not None]
            images = torch.stack([image for _, image in good]) if good else torch.empty(0)
            yield images, torch.tensor([i for i, _ in good], dtype=torch.long), bad_files


def labeled_folder(folder: str | Path, transform: Callable[[Image.Image], Tensor]) -> LabeledImages:
    """Every image below `folder/<class>/`, classes and files in sorted order, as torchvision's
    ImageFolder numbers them."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"'{root}' is not a folder: name one that holds a folder of images for each class."
        )
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir()))
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not found:
        raise ValueError(
            f"'{root}' holds no labeled images: give a folder with one folder of images for each "
            "class."
        )
    paths, labels = zip(*found, strict=True)
    return LabeledImages(paths, labels, classes, transform)


def train_and_val(
    data_path: str | Path, transform: Callable[[Image.Image], Tensor]
) -> tuple[LabeledImages, LabeledImages, str]:
    """The two halves of an evaluation and one sentence that says what they are.

    `data_path` holds `train/` and `val/` with the same class folders, as for the official scripts,
    or class folders only: then every fourth image of each class, in sorted order, is held out.
    """
    root = Path(data_path)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return _given_halves(root, transform)
    halves = [name for name in ("train", "val") if (root / name).is_dir()]
    if halves:
        other = "val" if halves == ["train"] else "train"
        raise ValueError(
            f"'{root}' has {halves[0]}/ but not {other}/: give both, or a folder of class folders "
            "alone."
        )
    every = labeled_folder(root, transform)
    if len(every.classes) < 2:
        raise ValueError(
            f"'{root}' holds one class only, '{every.classes[0]}': give a folder for each of two "
            "or more."
        )
    position: dict[int, int] = {}
    held_out = []
    for label in every.labels:
        position[label] = position.get(label, 0) + 1
        held_out.append(position[label] % HOLD_OUT_EVERY == 0)
    train, val = (
        every.pick([i for i, out in enumerate(held_out) if out == side]) for side in (False, True)
    )
    if not len(val):
        raise ValueError(
            f"'{root}' has fewer than {HOLD_OUT_EVERY} images in each class, so none can be held "
            "out: add images, or give a folder with train/ and val/."
        )
    return (
        train,
        val,
        (
            f"No train/ and val/ in '{root}': every {HOLD_OUT_EVERY}th image of each class is held "
            f"out; {len(train)} images to compare with, {len(val)} to classify."
        ),
    )


def _given_halves(
    root: Path, transform: Callable[[Image.Image], Tensor]
) -> tuple[LabeledImages, LabeledImages, str]:
    """`train/` and `val/` of `root`, the labels of both those of `train/`."""
    train, val = (labeled_folder(root / split, transform) for split in ("train", "val"))
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise ValueError(
            f"'{root}/val' has the class '{unknown[0]}' but '{root}/train' has not: both need "
            "the same."
        )
    number = {name: label for label, name in enumerate(train.classes)}
    val = replace(
        val,
        labels=tuple(number[val.classes[label]] for label in val.labels),
        classes=train.classes,
    )
    return (
        train,
        val,
        f"{len(train)} images to compare with (train/), {len(val)} to classify (val/).",
    )
