"""The plan carried out in C++ (csrc/cpu/multicrop.cpp): the crops of the PIL backend, bit for bit, several times sooner.

PIL decodes, so that both backends take and refuse the same files; C++ then makes all crops of an image in one call. Images are
worked on by threads, which wait for the GIL only between the two.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinofast.data import pil
from dinofast.data.threads import Threads

try:
    from dinofast import _C
except ImportError:  # no compiler when the package was installed
    _C = None

Task = tuple[int, np.ndarray]  # epoch, samples (B,)
Refusals = list[tuple[str, str]]  # path, reason
AHEAD = 3  # micro-batches in the making
_KINDS = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2}


def missing() -> str:
    """Why this backend cannot be used here; empty if it can."""
    return "" if _C is not None else "the C++ core was not built (install again on a machine with a C++17 compiler)"


def pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image, to be read: (H, W, 4) uint8 where Pillow lends its own memory, which has a byte to spare
    (since 11.3, unless the image lies in several blocks), which then shows what is done to the image; otherwise a copy
    (H, W, 3)."""
    if hasattr(image, "__arrow_c_array__") and Image.core.get_alignment() == 1:  # as long as nobody asks for gaps between rows
        with suppress(ValueError):
            return _C.lent(image.__arrow_c_array__()[1], image.height, image.width)
    return np.asarray(image)


def render(image: np.ndarray, views: np.ndarray, places: Sequence[Tensor], table: np.ndarray | None = None) -> None:
    """Every crop of one image into its place.

    image (H, W, 3 or 4) uint8, red, green and blue first; views (V,) of `plan.VIEW`; places: V contiguous tensors (3, S, S),
    uint8, or float32 or bfloat16 by table (3, 256), what each level of each channel becomes. Raises ValueError for a box
    outside the image, a number beyond all reason, or a place that the crop does not fit.
    """
    for place, side in zip(places, views["size"].tolist(), strict=True):  # C++ sees only where they begin
        if place.shape != (3, side, side) or place.dtype != places[0].dtype or place.is_cuda or not place.is_contiguous():
            raise ValueError(f"a crop (3, {side}, {side}) does not fit its place: {place.dtype} {tuple(place.shape)}")
    _C.multicrop(np.ascontiguousarray(image), np.ascontiguousarray(views), [place.data_ptr() for place in places],
                 _KINDS[places[0].dtype], table)


class Batches:
    """Endless iterator over micro-batches, AHEAD of them in the making by threads.

    `next` gives the crops, one tensor (V_r B, 3, S_r, S_r) per resolution, crop-major, and (path, reason) of each file
    refused; no crops if no file decodes any more. tasks: (epoch, samples (B,)), endless. draw(epoch, samples): the plan (B, V).
    decode(sample, refusals): the RGB image of the sample or of the next that decodes, and which that was; None if none
    does. resolutions: number of crops and side, (V_r, S_r). table, dtype: see `render`; without a table the crops are
    uint8. pinned: in memory from which a GPU copies without waiting. threads: 0 works in `next` itself.
    """

    def __init__(self, tasks: Iterator[Task], draw: Callable[[int, np.ndarray], np.ndarray],
                 decode: Callable[[int, Refusals], tuple[Image.Image | None, int]], resolutions: Sequence[tuple[int, int]],
                 table: np.ndarray | None, dtype: torch.dtype, pinned: bool, threads: int) -> None:
        pil.for_threads()
        self._tasks, self._draw, self._decode = tasks, draw, decode
        self._resolutions, self._table, self._pinned = resolutions, table, pinned
        self._dtype = torch.uint8 if table is None else dtype
        self._pool, self._n_ahead = Threads(threads), AHEAD if threads else 1
        self._ahead: deque[Future] = deque()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[list[Tensor], Refusals]:
        while len(self._ahead) < self._n_ahead:
            self._ahead.append(self._pool.submit(self._begin, *next(self._tasks)))
        crops, images = self._ahead.popleft().result()
        done = [image.result() for image in images]
        refusals = [refusal for _, refused in done for refusal in refused]
        return [c.flatten(0, 1) for c in crops] if all(found for found, _ in done) else [], refusals

    def _begin(self, epoch: int, samples: np.ndarray) -> tuple[list[Tensor], list[Future]]:
        """The memory of a micro-batch, (V_r, B, 3, S_r, S_r) each, and its images on their way into it."""
        drawn = self._draw(epoch, samples)
        crops = [self._empty(n, len(samples), 3, side, side) for n, side in self._resolutions]
        return crops, [self._pool.submit(self._image, epoch, sample, drawn[b], [place[b] for c in crops for place in c])
                       for b, sample in enumerate(samples.tolist())]

    def _empty(self, *shape: int) -> Tensor:
        if self._pinned:
            return torch.empty(shape, dtype=self._dtype, pin_memory=True)
        return torch.from_numpy(_C.empty(math.prod(shape) * self._dtype.itemsize)).view(self._dtype).view(shape)

    def _image(self, epoch: int, sample: int, views: np.ndarray, places: list[Tensor]) -> tuple[bool, Refusals]:
        refusals: Refusals = []
        image, used = self._decode(sample, refusals)
        if image is not None:
            render(pixels(image), views if used == sample else self._draw(epoch, np.array([used]))[0], places, self._table)
        return image is not None, refusals

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._pool.close()
        self._ahead.clear()
