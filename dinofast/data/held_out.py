"""Crops that a run never trains on, always the same: for scores that need no labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from dinofast.data.augmentation import VIEW, Augmentation
from dinofast.data.backend_own import OwnCrops, in_processes, levels_of
from dinofast.data.decode import UnreadableImage
from dinofast.data.reader import ImageReader

EPOCH = 2**32 - 1  # whose draws they have; no run lasts so long


def evenly(n: int, most: int) -> list[int]:
    """At most so many indices below n, from all over."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()


def held_out_crops(
    reader: ImageReader,
    augmentation: Augmentation,
    own: OwnCrops | None,
    indices: Sequence[int],
    threads: int,
) -> tuple[torch.Tensor, np.ndarray | None]:
    """The two global crops of each of n images: uint8, or normalized float32, (n, 2, C, G, G), and
    their plan, VIEW (n, 2). own: what makes the crops of the run, where it is not our backends;
    there is no plan of a caller's own augmentation. Images that cannot be read are left out."""

    made = partial(_crops_of, reader, augmentation, own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
        if own:
            found = in_processes(made, indices, threads)
        else:
            with ThreadPoolExecutor(max(threads, 1)) as pool:
                found = list(pool.map(made, indices))
    found = [pair for pair in found if pair]
    if not found:
        side = augmentation.views[0].size
        return torch.empty(0, 2, 3, side, side, dtype=torch.uint8), np.empty((0, 2), VIEW)
    crops = [torch.from_numpy(crops) for crops, _ in found]
    plan = None if own and own.augment else np.stack([views for _, views in found])
    return torch.stack(own.alike(crops) if own else crops), plan


def _crops_of(
    reader: ImageReader, augmentation: Augmentation, own: OwnCrops | None, index: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Of one image, (2, C, G, G) and VIEW (2,); as arrays, which come from another process without
    shared memory."""
    try:
        image = reader.decode(index)
    except UnreadableImage:
        return None
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    views = augmentation.draw(EPOCH, np.array([index])).plan(0, height, width)[:2]
    if own and (own.augment or isinstance(image, np.ndarray)):
        return torch.stack(own.crops(image, EPOCH, index)[:2]).numpy(), views
    return torch.stack(levels_of(image, views)).numpy(), views
