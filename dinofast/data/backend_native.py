"""The plan carried out in C++ (csrc/cpu/multicrop.cpp): the crops of the PIL backend, bit for bit,
several times sooner.

PIL decodes, so that both backends find the same files bad; C++ then makes all crops of an image in
one call. Images are worked on by threads, which wait for the GIL only between the two.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinofast.data.augmentation import Draw
from dinofast.data.decode import prepare_threads
from dinofast.data.reader import Met
from dinofast.data.sampler import BatchIndices
from dinofast.data.threads import Threads

_C: Any = None
with suppress(ImportError):  # no compiler when the package was installed
    _C = import_module("dinofast._C")

AHEAD = 3  # micro-batches in the making
_KINDS = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2}


def unavailable_reason() -> str | None:
    """Why this backend cannot be used here; None if it can."""
    return (
        None
        if _C is not None
        else "the C++ core was not built (install again on a machine with a C++17 compiler)"
    )


def pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image, to be read: (H, W, 4) uint8 where Pillow lends its own memory,
    which has a byte to spare (since 11.3, unless the image lies in several blocks), which then
    shows what is done to the image; otherwise a copy (H, W, 3)."""
    # as long as nobody asks for gaps between rows
    if hasattr(image, "__arrow_c_array__") and Image.core.get_alignment() == 1:
        with suppress(ValueError):
            return _C.arrow_view(image.__arrow_c_array__()[1], image.height, image.width)
    return np.asarray(image)


def render(
    image: np.ndarray, views: np.ndarray, out: Sequence[Tensor], norm_lut: np.ndarray | None = None
) -> None:
    """Every crop of one image, written into `out`.

    image (H, W, 3 or 4) uint8, red, green and blue first; views (V,) of `augmentation.VIEW`; out: V
    contiguous tensors (3, S, S), uint8, or float32 or bfloat16 by norm_lut (3, 256), what each
    level of each channel becomes. Raises ValueError for a box outside the image, a number beyond
    all reason, or a tensor that the crop does not fit.
    """
    # C++ sees only where they begin
    for crop, side in zip(out, views["size"].tolist(), strict=True):
        if (
            crop.shape != (3, side, side)
            or crop.dtype != out[0].dtype
            or crop.is_cuda
            or not crop.is_contiguous()
        ):
            raise ValueError(
                f"a crop (3, {side}, {side}) does not fit its place: {crop.dtype} "
                f"{tuple(crop.shape)}"
            )
    _C.multicrop(
        np.ascontiguousarray(image),
        np.ascontiguousarray(views),
        [crop.data_ptr() for crop in out],
        _KINDS[out[0].dtype],
        norm_lut,
    )


class Batches:
    """Endless iterator over micro-batches, AHEAD of them in the making by threads.

    `next` gives the crops, one tensor (V_r B, 3, S_r, S_r) per resolution, crop-major; the files
    met that gave no image; and how many images were replaced. No crops if no image can be had any
    more. indices: (epoch, indices (B,)), endless. draw(epoch, indices): what is drawn for them.
    decode(index, met): the RGB image at the index or the next that decodes, and its index; no image
    if none does. resolutions: number of crops and side, (V_r, S_r). norm_lut, dtype: see `render`;
    without a norm_lut the crops are uint8. pinned: in memory from which a GPU copies without
    waiting. threads: 0 works in `next` itself.
    """

    def __init__(
        self,
        indices: Iterator[BatchIndices],
        draw: Callable[[int, np.ndarray], Draw],
        decode: Callable[[int, list[Met]], tuple[Image.Image | None, int]],
        resolutions: Sequence[tuple[int, int]],
        norm_lut: np.ndarray | None,
        dtype: torch.dtype,
        pinned: bool,
        threads: int,
    ) -> None:
        prepare_threads()
        self._indices, self._draw, self._decode = indices, draw, decode
        self._resolutions, self._norm_lut, self._pinned = resolutions, norm_lut, pinned
        self._dtype = torch.uint8 if norm_lut is None else dtype
        self._pool, self._n_ahead = Threads(threads), AHEAD if threads else 1
        self._ahead: deque[Future] = deque()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[list[Tensor], list[Met], int]:
        while len(self._ahead) < self._n_ahead:
            self._ahead.append(self._pool.submit(self._begin, *next(self._indices)))
        crops, images = self._ahead.popleft().result()
        done = [image.result() for image in images]
        met = [file for _, _, own in done for file in own]
        crops = [c.flatten(0, 1) for c in crops] if all(found for found, _, _ in done) else []
        return crops, met, sum(replaced for _, replaced, _ in done)

    def _begin(self, epoch: int, indices: np.ndarray) -> tuple[list[Tensor], list[Future]]:
        """The memory of a micro-batch, (V_r, B, 3, S_r, S_r) each, and its images on their way into
        it."""
        draw = self._draw(epoch, indices)
        crops = [self._empty(n, len(indices), 3, side, side) for n, side in self._resolutions]
        return crops, [
            self._pool.submit(
                self._image, epoch, index, draw, b, [view[b] for c in crops for view in c]
            )
            for b, index in enumerate(indices.tolist())
        ]

    def _empty(self, *shape: int) -> Tensor:
        if self._pinned:
            return torch.empty(shape, dtype=self._dtype, pin_memory=True)
        return (
            torch.from_numpy(_C.empty(math.prod(shape) * self._dtype.itemsize))
            .view(self._dtype)
            .view(shape)
        )

    def _image(
        self, epoch: int, index: int, draw: Draw, b: int, out: list[Tensor]
    ) -> tuple[bool, bool, list[Met]]:
        """Whether there is an image for this place, whether it is another, and the files met that
        gave no image."""
        met: list[Met] = []
        image, used = self._decode(index, met)
        if image is not None:
            if used != index:
                draw, b = self._draw(epoch, np.array([used])), 0
            render(pixels(image), draw.plan(b, image.height, image.width), out, self._norm_lut)
        return image is not None, used != index, met

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._pool.close()
        self._ahead.clear()
