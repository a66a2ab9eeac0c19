"""Images of any source and labeled folders, in batches, and the official evaluation transform, with
PIL alone but torchvision's rounding rules."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.dataset import ImageDataset, scan, walk
from ..data.decode import BadFiles, UnreadableImage, decode, read_file
from ..data.names import Ignored, is_hidden
from ..data.shards import is_shard
from ..runtime.memory import fewer_workers, share, why_workers_ended
from ..runtime.progress import counting
from ..runtime.terminal import printable, say
from ..runtime.words import counted

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HOLD_OUT_EVERY = 4
# images that a worker passes on at a time: a batch of 128 is 73 MiB, more than all of /dev/shm in a
# container, and as a list it is 128 open files
SHARE, SHARES_AHEAD = 8, 2
WORKER_ENDS_S = 5
LONGEST = 64  # sides that are longer than so many short ones are not resized as a whole
SPLITS = {"train", "val", "test", "valid", "validation"}


@dataclass(frozen=True)
class EvalTransform:
    """PIL image -> (3, crop, crop) fp32: shorter side to `resize` (bicubic), center crop, [0, 1],
    minus mean, over std. Memory does not grow with the shape: of an image LONGEST times as long as
    wide and more only the part is resized that the crop shows.

    The defaults are the official evaluation. Raises ValueError when the crop is larger than the
    resized image can be.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(
                f"the center crop of {self.crop} pixels does not fit into images whose shorter "
                f"side is resized to {self.resize}: choose a `crop` from 1 to `resize`."
            )

    def __call__(self, image: Image.Image) -> Tensor:
        w, h = image.size
        short, long = min(w, h), max(w, h)
        other = int(self.resize * long / short)
        w, h = (self.resize, other) if w <= h else (other, self.resize)
        left, top = int(round((w - self.crop) / 2)), int(round((h - self.crop) / 2))
        box = (left, top, left + self.crop, top + self.crop)
        if long <= LONGEST * short:
            image = image.resize((w, h), Image.Resampling.BICUBIC).crop(box)
        else:  # the same but for rounding
            x, y = image.width / w, image.height / h
            right, bottom = (min(box[2] * x, image.width), min(box[3] * y, image.height))
            part = (left * x, top * y, right, bottom)
            image = image.resize((self.crop, self.crop), Image.Resampling.BICUBIC, part)
        return to_tensor(image, self.mean, self.std)


def to_tensor(
    image: Image.Image, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """RGB image -> normalized (3, h, w) fp32."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


class Batches(Dataset):
    """Images by number, read by worker processes: item i is (i, tensor, None), or (i, None, reason)
    when it cannot be read.

    transform: RGB image -> tensor. decode: bytes -> RGB image. probe: width and height of an image
    that says how much memory one takes, where the transform keeps its size.
    """

    transform: Callable[[Image.Image], Tensor]
    decode: Callable[[bytes], Image.Image]
    labels: Sequence[int] | np.ndarray  # -1: none
    classes: tuple[str, ...]
    probe: tuple[int, int] = (8, 8)

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, i: int) -> str | Path:
        raise NotImplementedError

    def read(self, i: int) -> bytes:
        """The whole encoded image. Raises `UnreadableImage`."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, str | None]:
        try:
            return i, self.transform(self.decode(self.read(i))), None
        except (UnreadableImage, ValueError) as error:
            return i, None, str(error)

    def batches(
        self, batch_size: int, num_workers: int, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, list[tuple[str | Path, str]]]]:
        """In order, from the image `first` on: images (B, 3, h, w), their rows (B,), and what could
        not be read in this batch as (path, reason). Workers pass on SHARE images at a time,
        stacked. Where shared memory is too small for all workers fewer start, and a line says
        so."""
        share = min(batch_size, SHARE)
        if num_workers:
            each = self.transform(Image.new("RGB", self.probe)).nbytes
            num_workers, remark = fewer_workers(num_workers, SHARES_AHEAD * share * each)
            if remark:
                _tell_once(remark)
        n = len(self)
        shares = [
            range(start, min(start + share, begin + batch_size, n))
            for begin in range(first, n, batch_size)
            for start in range(begin, min(begin + batch_size, n), share)
        ]
        loader = DataLoader(
            self,
            batch_sampler=shares,  # type: ignore[arg-type]  # ranges for lists
            num_workers=num_workers,
            collate_fn=_stacked,
            prefetch_factor=SHARES_AHEAD if num_workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
        )
        images, rows, bad_files = list[Tensor](), list[int](), list[tuple[str | Path, str]]()
        for done, (own, own_rows, bad) in zip(shares, _all_of(loader), strict=True):
            # out of shared memory, which the next ones need
            images += [own.clone() if num_workers else own] if own_rows else []
            rows += own_rows
            bad_files += [(self.path(i), reason) for i, reason in bad]
            if (done.stop - first) % batch_size == 0 or done.stop == n:
                batch = torch.cat(images) if images else torch.empty(0)
                yield batch, torch.tensor(rows, dtype=torch.long), bad_files
                images, rows, bad_files = [], [], []


@dataclass(frozen=True)
class LabeledImages(Batches):
    """Image files with labels. ignored: what else lies in the folder, in a sentence or ""."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]
    ignored: str = ""
    decode: Callable[[bytes], Image.Image] = decode
    probe: tuple[int, int] = (8, 8)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> Path:
        return self.paths[i]

    def read(self, i: int) -> bytes:
        return read_file(self.paths[i])

    def pick(self, rows: Sequence[int]) -> LabeledImages:
        return replace(
            self,
            paths=tuple(self.paths[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
        )


@dataclass(frozen=True)
class ListedImages(Batches):
    """The images of any source. labels: (N,) by `classes_of`, or all -1."""

    listed: ImageDataset
    transform: Callable[[Image.Image], Tensor]
    decode: Callable[[bytes], Image.Image] = decode
    labels: Sequence[int] | np.ndarray = ()
    classes: tuple[str, ...] = ()
    probe: tuple[int, int] = (8, 8)

    def __len__(self) -> int:
        return len(self.listed)

    def path(self, i: int) -> str:
        return self.listed.path(i)

    def read(self, i: int) -> bytes:
        return self.listed.read(i)


def image_files(
    paths: Sequence[Path],
    transform: Callable[[Image.Image], Tensor],
    decode: Callable[[bytes], Image.Image] = decode,
    probe: tuple[int, int] = (8, 8),
) -> LabeledImages:
    """Files in this order, without labels."""
    none = (-1,) * len(paths)
    return LabeledImages(tuple(paths), none, (), transform, decode=decode, probe=probe)


def listed_images(
    source: str | Path,
    transform: Callable[[Image.Image], Tensor],
    decode: Callable[[bytes], Image.Image] = decode,
    probe: tuple[int, int] = (8, 8),
) -> ListedImages:
    """The images of any source that pretraining takes, with labels where it is a folder of class
    folders; says what of it is left out. Raises `ValueError` as `data.dataset.scan` does."""
    listed = scan(os.fspath(source), counting("scanning files", True))
    for told in filter(None, (listed.ignored, *_left_out(listed.bad_files))):
        say(printable(told))
    classes, labels = classes_of(source, listed)
    return ListedImages(listed, transform, decode, labels, classes, probe)


def _left_out(bad_files: BadFiles) -> list[str]:
    return [f"left out, cannot be read: {path} ({reason})" for path, reason in bad_files]


def classes_of(source: str | Path, listed: ImageDataset) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes and labels (N,) int64 of the images of a source, numbered as `labeled_folder` does:
    those of a folder in which every image lies in one of two folders or more, and which are not
    train/ and val/; else no classes, and -1 for each image."""
    labels = np.full(len(listed), -1)
    classes = _folders(Path(source)) if os.path.isdir(source) and listed.members is None else ()
    if len(classes) < 2 or SPLITS.issuperset(classes):
        return (), labels
    number = {os.fsencode(name): label for label, name in enumerate(classes)}
    for i, name in enumerate(listed.files):
        own, slash, _ = name.partition(b"/")
        if not slash or own not in number:
            return (), np.full(len(listed), -1)
        labels[i] = number[own]
    return classes, labels


def _leave_signals_to_the_parent(worker: int) -> None:
    """What reaches the whole process group, such as Ctrl-C, is answered by the parent, which ends
    its workers; one that is told to end and is not ended does so by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: signal.alarm(WORKER_ENDS_S) and None)


def _all_of(loader: DataLoader) -> Iterator[tuple[Tensor, list[int], list[tuple[int, str]]]]:
    """What a loader gives. Raises OSError, with a way out, for a worker that was killed."""
    try:
        yield from loader
    except RuntimeError as error:
        if not (reason := why_workers_ended(error)):
            raise
        raise OSError(f"{reason}: lower `num_workers`.") from error


@cache
def _tell_once(remark: str) -> None:
    say(remark)


def _stacked(
    items: list[tuple[int, Tensor | None, str | None]],
) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
    """In the worker: images (n, 3, h, w), their rows, and of what could not be read row and
    reason."""
    good = [(i, image) for i, image, _ in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    share([images])
    return images, [i for i, _ in good], [(i, reason) for i, _, reason in items if reason]


def labeled_folder(folder: str | Path, transform: Callable[[Image.Image], Tensor]) -> LabeledImages:
    """Every image below `folder/<class>/`, at any depth, with the files that training takes from a
    folder; classes and files in sorted order, as torchvision's ImageFolder numbers them."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"'{root}' is not a folder: name one that holds a folder of images for each class."
        )
    classes = _folders(root)
    number = {name: label for label, name in enumerate(classes)}
    ignored, unlisted, found = Ignored(), BadFiles(), list[tuple[int, str]]()
    for name in map(os.fsdecode, walk(os.fsencode(os.path.join(root, "")), unlisted, ignored)):
        own, slash, _ = name.partition("/")
        if is_shard(os.fsencode(name)):
            ignored.files[".tar"] += 1
        elif not slash:
            ignored.files["outside of class folders"] += 1
        else:
            found.append((number[own], name))
    found.sort(key=lambda item: item[0])  # `walk` sorts a-b/ before a/
    told = [str(ignored)] if str(ignored) else []
    told += [f"{path}: {reason}" for path, reason in unlisted]
    if not found:
        more = f" ({'; '.join(told)})" if told else ""
        raise ValueError(
            f"'{root}' holds no labeled images{more}: give a folder with one folder of images for "
            "each class."
        )
    labels = tuple(label for label, _ in found)
    if empty := [classes[i] for i in sorted(set(range(len(classes))) - set(labels))]:
        names = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        told.append(f"{counted(len(empty), 'class folder')} without images: {names}")
    paths = tuple(root / name for _, name in found)
    return LabeledImages(paths, labels, classes, transform, "; ".join(told))


def _folders(root: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return tuple(
        sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(os.fsencode(p.name)))
    )


def train_and_val(
    data_path: str | Path, transform: Callable[[Image.Image], Tensor]
) -> tuple[LabeledImages, LabeledImages, str]:
    """The two halves of an evaluation and one sentence that says what they are.

    `data_path` holds `train/` and `val/` with the same class folders, as for the official scripts,
    or class folders only: then every fourth image of each class, in sorted order, is held out. A
    folder of images called train or val among others is a class.
    """
    root = Path(data_path)
    if has_halves(root):
        return given_halves(root, transform)
    inside, halves = _halves(root)
    if halves and SPLITS.issuperset(inside):
        missing = next((name for name in ("train", "val") if name not in halves), None)
        if missing:
            raise ValueError(
                f"'{root}' has {'/, '.join(halves)}/ but not {missing}/: give both, or a folder of "
                "class folders alone."
            )
        flat = next(name for name, classes in halves.items() if not classes)
        raise ValueError(
            f"'{root / flat}' holds no class folders: sort its images into a folder for each class."
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
            f"out; {counted(len(train), 'image')} to compare with, {len(val):,} to classify."
        ),
    )


def _halves(root: Path) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The folders in a folder, and of train/ and val/ those in them."""
    inside = _folders(root) if root.is_dir() else ()
    return inside, {name: _folders(root / name) for name in inside if name in ("train", "val")}


def has_halves(root: Path) -> bool:
    """Whether train/ and val/ in it both hold class folders."""
    halves = _halves(root)[1]
    return len(halves) == 2 and all(halves.values())


def given_halves(
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
        f"{counted(len(train), 'image')} to compare with (train/), {len(val):,} to classify "
        "(val/).",
    )
