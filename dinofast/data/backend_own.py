"""Crops of a caller's own data set, or by a caller's own augmentation, made in worker processes.

A data set of one's own need not be safe in threads, and an augmentation in Python would hold the
GIL.
"""

from __future__ import annotations

import pickle
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinofast.data import array_crops, backend_native, backend_pil
from dinofast.data.augmentation import Augmentation
from dinofast.data.items import Pixels
from dinofast.data.reader import Met
from dinofast.data.sampler import BatchIndices
from dinofast.runtime.memory import share
from dinofast.runtime.words import a_kind, one_line

# image, which crop of it, a generator of its own -> the crop
Augment = Callable[[Pixels, int, np.random.Generator], Any]


class OwnCrops(Dataset):
    """Item (epoch, indices (B,)): as of `backend_pil.CropDataset`, crops (V_r B, C, S_r, S_r) per
    resolution, what was met, how many were replaced.

    decode: see `ImageReader.decode_next`. augment: the caller's, or None for the plan. mean, std:
    of each channel; crops that are not levels of 8 bits come normalized.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        decode: Callable[[int, list[Met]], tuple[Any, int]],
        augment: Augment | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._augmentation, self._decode, self.augment = augmentation, decode, augment
        self._mean, self._std = (torch.tensor(c).view(-1, 1, 1) for c in (mean, std))
        self.makes_levels = True  # of 8 bits; the loader sets it after `try_out`

    def __getitem__(self, batch: BatchIndices) -> tuple[list[Tensor], list[Met], int]:
        epoch, indices = batch
        made: list[list[Tensor]] = [[] for _ in self._augmentation.views]
        met: list[Met] = []
        n_replaced = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
            for index in indices.tolist():
                image, used = self._decode(index, met)
                if image is None:
                    return [], met, n_replaced
                n_replaced += used != index
                for crops, crop in zip(made, self.crops(image, epoch, used), strict=True):
                    crops.append(crop)
        n = len(indices)
        flat = self.alike([crop for crops in made for crop in crops])
        stacked = [torch.stack(flat[v : v + n]) for v in range(0, len(flat), n)]
        groups, start = [], 0
        for n, _ in self._augmentation.resolutions:
            groups.append(torch.cat(stacked[start : start + n]))
            start += n
        share(groups)
        return groups, met, n_replaced

    def crops(self, image: Pixels, epoch: int, index: int) -> list[Tensor]:
        """All of one image, (C, S, S) each: uint8, or normalized float32."""
        if self.augment is not None:
            return self._by_caller(image, epoch, index)
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        views = self._augmentation.draw(epoch, np.array([index])).plan(0, height, width)
        if isinstance(image, np.ndarray):
            return [self._normalized(array_crops.render(image, view)) for view in views]
        return levels_of(image, views)

    def _by_caller(self, image: Pixels, epoch: int, index: int) -> list[Tensor]:
        """Raises `ValueError` for a crop of another kind or size than it has to be."""
        crops = []
        assert self.augment is not None
        for v, view in enumerate(self._augmentation.views):
            rng = np.random.default_rng([self._augmentation.seed, epoch, index, v])
            try:
                with _global_generators(rng):
                    made = self.augment(image, v, rng)
            except Exception as error:  # whatever code of somebody else's may raise
                raise ValueError(
                    f"`augmentation` fails on image {index}, view {v}: {type(error).__name__}: "
                    f"{one_line(error)}."
                ) from error
            crop = _tensor_of(made)
            wanted = (len(self._mean), view.size, view.size)
            if tuple(crop.shape) != wanted:
                raise ValueError(
                    f"`augmentation` gives a crop of shape {tuple(crop.shape)} for view {v}: it "
                    f"must be {wanted}."
                )
            crops.append(crop)
        return crops

    def try_out(self, index: int) -> tuple[bool, str, list[Met]]:
        """Make the crops of an image: whether they are levels of 8 bits; why they cannot be
        made, or ""; and what was met, where there is no image."""
        met: list[Met] = []
        image, index = self._decode(index, met)
        if image is None:
            return True, "", met
        try:
            kinds = {crop.dtype for crop in self.crops(image, 0, index)}
        except ValueError as error:
            return True, str(error), []
        mixed = "`augmentation` gives uint8 for some crops and floats for others."
        return kinds == {torch.uint8}, mixed if len(kinds) > 1 else "", []

    def alike(self, crops: list[Tensor]) -> list[Tensor]:
        """Levels (..., C, S, S) normalized where others are floats, so that all can be joined."""
        if len({crop.dtype for crop in crops}) < 2:
            return crops
        return [self._normalized(c / 255) if c.dtype == torch.uint8 else c for c in crops]

    def _normalized(self, crop: Tensor) -> Tensor:
        return (crop - self._mean) / self._std


def levels_of(image: Image.Image, views: np.ndarray) -> list[Tensor]:
    """The crops of an RGB image by a plan, VIEW (n,): uint8 (3, S, S) each."""
    if backend_native.unavailable_reason() is None:
        out = [torch.empty(3, v, v, dtype=torch.uint8) for v in views["size"].tolist()]
        backend_native.render(backend_native.pixels(image), views, out)
        return out
    rendered = (backend_pil.render(image, view) for view in views)
    return [torch.tensor(crop).permute(2, 0, 1) for crop in rendered]


class _Made(Dataset):
    """Item i: what `make` makes of it."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


def in_processes(make: Callable[[int], Any], indices: Sequence[int], n_workers: int) -> list[Any]:
    """What `make` makes of each index, in worker processes that end with it; with 0 in this thread.

    What a data set opens when it is first asked (a file, a database) must not be open before the
    workers of a run begin, which would share its position, nor be used by another thread. Raises
    `ValueError` where it cannot be sent to a process.
    """
    loader = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=indices,
        num_workers=min(n_workers, len(indices)),
        collate_fn=as_it_is,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # leave the global one alone
    )
    try:
        made = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the data set or the augmentation cannot be sent to worker processes "
            f"({one_line(error)}): define its class and functions at the top level of a module, "
            "or take `num_workers` 0."
        ) from error
    return list(made)


def as_it_is(item: object) -> object:
    return item


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the parent answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _global_generators(rng: np.random.Generator) -> Iterator[None]:
    """While this lasts, what torch's, NumPy's and Python's own generators give is a function of
    `rng` too: torchvision's transforms draw from them."""
    seeds = rng.spawn(1)[0].integers(2**32, size=3)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    random.seed(int(seeds[2]))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _tensor_of(crop: Any) -> Tensor:
    """uint8 or float32 (C, S, S) of a PIL image, an array (S, S, C) or a tensor (C, S, S)."""
    if isinstance(crop, Image.Image):
        crop = np.asarray(crop)
    if isinstance(crop, np.ndarray):
        crop = torch.tensor(crop)
        crop = crop[None] if crop.ndim == 2 else crop.permute(2, 0, 1)
    if not isinstance(crop, Tensor):
        raise ValueError(
            f"`augmentation` returns {a_kind(crop)}: give a PIL image, an array (S, S, C), or a "
            "tensor (C, S, S); uint8, or float32 that is normalized already."
        )
    return crop if crop.dtype == torch.uint8 else crop.float()
