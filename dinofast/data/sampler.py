"""Which images, in which order: the permutation of an epoch, and the batches of indices of one
process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from dinofast.data.philox import philox

SHUFFLE = 0xFFFFFFFF  # the "view" whose numbers order the epoch

BatchIndices = tuple[int, np.ndarray]  # epoch, indices of the batch's images: int64 (B,)


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of n images seen in this epoch, int64 (n,): indices sorted by 64 random bits
    each."""
    bits = philox(np.arange((n + 1) // 2), SHUFFLE, 0, epoch, seed).astype(np.uint64)
    return np.argsort((bits[:, ::2] << np.uint64(32) | bits[:, 1::2]).ravel()[:n], kind="stable")


def batch_indices(
    seed: int,
    n_images: int,
    steps_per_epoch: int,
    *,
    batch_size: int,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> Iterator[BatchIndices]:
    """The micro-batches of one process, endless, from optimizer step `start_step` on.

    Number m of rank r takes `batch_size` (B) rows of the step's global batch, from row (m world +
    r) B on, so that neither the number of processes nor `accumulate` changes what a step sees.
    """
    drawn = -1
    for step in itertools.count(start_step):
        epoch, row = divmod(step, steps_per_epoch)
        if epoch != drawn:
            order, drawn = epoch_order(seed, epoch, n_images), epoch
        for m in range(accumulate):
            start = ((row * accumulate + m) * world + rank) * batch_size
            yield epoch, order[start : start + batch_size]
