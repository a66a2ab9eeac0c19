"""The plan carried out by NVIDIA DALI: decoding and cuts in its graph, on a GPU by nvJPEG; then
color by `ops.color`.

    bytes -> decoders.image, once an image
          -> one resize a view, whose box is its region of interest
          -> uint8 (B, S, S, 3), without a copy
          -> ops.color, which mirrors too: a box that runs backwards is off by a level at times

DALI's own color operators are not used: they are another augmentation. Its cut differs from
Pillow's by rounding (0.2 levels of 255 on average), and so does decoding on a GPU.

What is a plain JPEG goes to DALI as it is; everything else is decoded by PIL and goes there as PNM,
which loses nothing. So all backends find the same files bad and replace them alike. Where DALI
fails all the same, the batch's images are tried one by one, what it cannot decode is left to PIL
from then on, and the same batch is made again by a new graph.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinofast import ops
from dinofast.data.augmentation import Draw
from dinofast.data.decode import UnreadableImage, is_turned, prepare_threads
from dinofast.data.reader import Met
from dinofast.data.sampler import BatchIndices
from dinofast.data.threads import Threads

# of what goes to DALI as it is; PIL has a limit on decompression bombs, DALI has none
MOST_PIXELS = 10**8
TAIL = 64  # bytes that may follow the end marker of a plain JPEG
AHEAD = 3  # micro-batches in the making, of which the graph has the first
# markers of a JPEG: baseline, extended and progressive, Huffman coded;
FRAMES, PROGRESSIVE = (0xC0, 0xC1, 0xC2), 0xC2
# of Huffman codes, quanta, restarts, and comments
TABLES, SCAN, END, ADOBE = (0xC4, 0xDB, 0xDD, 0xFE), 0xDA, 0xD9, 0xEE


def unavailable_reason(device_type: str) -> str | None:
    """Why this backend cannot be used here with such a device; None if it can."""
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:  # no package of that maker at all
        found = None
    if not found:
        return "NVIDIA DALI is not installed (pip install nvidia-dali-cuda130)"
    kernel = ops.OPERATIONS["color"].kernels.get(device_type)
    reason = "no kernel for this device" if kernel is None else ops.unavailable_reason(kernel)
    return reason and f"ops.color, which it needs, cannot run on {device_type}: {reason}"


@cache
def _collect_before_forks() -> None:
    """A forked process that collected a graph which nobody uses any more would wait for its
    threads, which it does not have."""
    os.register_at_fork(before=gc.collect)


class Encoded(NamedTuple):
    """An image in a format that DALI decodes: its bytes, uint8 (n,), or None if no image decodes
    any more; height and width in pixels; the index whose image it is."""

    data: np.ndarray | None
    size: tuple[int, int]
    used: int


@dataclass
class Batch:
    """A micro-batch on its way."""

    epoch: int
    indices: list[int]
    draw: Draw
    work: list[Future]
    images: list[Encoded]
    met: list[Met]
    views: np.ndarray | None = None  # (B, V) of augmentation.VIEW; None if an image is missing


class Batches:
    """Endless iterator over micro-batches, AHEAD of them in the making.

    `next` gives the crops, one tensor (V_r B, 3, S_r, S_r) per resolution, crop-major, on the
    device and by its current stream, in `dtype`; the files met that gave no image; and how many
    images were replaced; no crops if no image can be had any more. indices: (epoch, indices (B,)),
    endless, B always the same. draw(epoch, indices): what is drawn for them. read(index): its
    encoded bytes, or UnreadableImage. decode(index, met): by PIL, the RGB image at the index or the
    next that decodes, and its index; no image if none does. resolutions: number of crops and side,
    (V_r, S_r). norm_lut (3, 256) float32 on the device: what each level of each channel becomes.
    device: "cpu" takes DALI's CPU operators. hw_decoder_load: share of the JPEGs for the GPU's
    decoding engine, where it has one. exif: JPEGs that EXIF turns are left to PIL.
    """

    def __init__(
        self,
        indices: Iterator[BatchIndices],
        draw: Callable[[int, np.ndarray], Draw],
        read: Callable[[int], bytes],
        decode: Callable[[int, list[Met]], tuple[Image.Image | None, int]],
        resolutions: Sequence[tuple[int, int]],
        norm_lut: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        threads: int,
        hw_decoder_load: float,
        exif: bool = False,
    ) -> None:
        self._indices, self._draw, self._read, self._decode = indices, draw, read, decode
        self._resolutions = resolutions
        self._norm_lut = norm_lut
        self._dtype = dtype
        self._device = device
        self._threads = threads
        self._batch_size = batch_size
        self._hw_decoder_load = hw_decoder_load
        self._exif = exif
        self._by_pil: set[int] = set()  # indices of images that DALI has failed on
        prepare_threads()
        _collect_before_forks()
        self._pool = Threads(threads)
        self._reading: deque[Batch] = deque()
        self._running: Batch | None = None
        # what the last color kernels read, and the event after them
        self._in_use: tuple[Any, Any] = (None, None)
        self._graph = self._new_graph()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[list[Tensor], list[Met], int]:
        batch = self._running or self._start_next()
        self._running = None  # whatever happens, it is not given twice
        cut = None if batch.views is None else self._outputs(batch)
        self._running = self._start_next()
        n_replaced = sum(
            image.used != index for image, index in zip(batch.images, batch.indices, strict=True)
        )
        crops = self._colored(cut, batch.views) if cut and batch.views is not None else []
        return crops, batch.met, n_replaced

    def close(self) -> None:
        """End the threads and the graph; what they have not begun is dropped."""
        self._pool.close()
        self._reading.clear()
        self._release()
        self._running = self._graph = None

    def _release(self) -> None:
        """Give DALI its memory back once the last color kernels have read it."""
        if self._in_use[1] is not None:
            self._in_use[1].synchronize()
        self._in_use = None, None

    # ---- the graph
    def _new_graph(self) -> Any:
        from nvidia.dali import fn, types

        def crops(image: Any) -> Iterator[Any]:
            for view, side in enumerate(side for n, side in self._resolutions for _ in range(n)):
                start, end = (
                    fn.external_source(name=f"{corner}{view}", dtype=types.FLOAT, ndim=1)
                    for corner in ("start", "end")
                )
                yield fn.resize(
                    image,
                    size=[side, side],
                    interp_type=types.INTERP_CUBIC,
                    antialias=True,
                    roi_start=start,
                    roi_end=end,
                )

        return self._decoding(self._batch_size, max(1, self._threads), crops)

    def _decoding(
        self, batch_size: int, threads: int, outputs: Callable[[Any], Iterable[Any]]
    ) -> Any:
        """A graph that decodes what "encoded" is fed with, and gives what `outputs` makes of
        that."""
        from nvidia.dali import Pipeline, fn, types

        gpu = self._device.type == "cuda"
        graph = Pipeline(
            batch_size,
            threads,
            (self._device.index or 0) if gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with graph:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            image = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                hw_decoder_load=self._hw_decoder_load,
            )
            graph.set_outputs(*outputs(image))
        graph.build()
        return graph

    def _start_next(self) -> Batch:
        """The next micro-batch, in the graph now; those after it are being read."""
        while len(self._reading) < AHEAD:
            epoch, indices = next(self._indices)
            work = [self._pool.submit(self._encoded, index) for index in indices.tolist()]
            self._reading.append(
                Batch(epoch, indices.tolist(), self._draw(epoch, indices), work, [], [])
            )
        batch = self._reading.popleft()
        for future in batch.work:
            image, met = future.result()
            batch.images.append(image)
            batch.met += met
        self._run(batch)
        return batch

    def _run(self, batch: Batch) -> None:
        """Draw the boxes, and put the batch into the graph, if all images are there."""
        if any(image.data is None for image in batch.images):
            batch.views = None
            return
        plans = []
        for b, (index, image) in enumerate(zip(batch.indices, batch.images, strict=True)):
            replaced = image.used != index
            draw, b = (
                (self._draw(batch.epoch, np.array([image.used])), 0)
                if replaced
                else (batch.draw, b)
            )
            plans.append(draw.plan(b, *image.size))
        batch.views = np.stack(plans)
        self._graph.feed_input("encoded", [image.data for image in batch.images])
        for view, drawn in enumerate(batch.views.T):  # (B,)
            box = drawn["box"].astype(np.float32)  # y, x, h, w
            self._graph.feed_input(f"start{view}", np.ascontiguousarray(box[:, :2]))
            self._graph.feed_input(f"end{view}", box[:, :2] + box[:, 2:])
        self._graph.schedule_run()

    def _outputs(self, batch: Batch) -> list[Any] | None:
        """Of the batch in the graph, V dense lists (B, S, S, 3) in DALI's memory; None if no file
        decodes any more."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            return [crops.as_tensor() for crops in self._graph.outputs(cuda_stream=stream)]
        except RuntimeError:
            failing = [
                b
                for b, image in enumerate(batch.images)
                if image.data is None or not self._decodes(image.data)
            ]
            if not failing:
                raise
        for b in failing:  # PIL's turn: it decodes or replaces them
            self._by_pil.add(batch.images[b].used)
            batch.images[b], met = self._encoded(batch.images[b].used)
            batch.met += met
        self._graph = self._new_graph()  # the old one may have lost its way
        self._run(batch)
        return None if batch.views is None else self._outputs(batch)

    def _colored(self, cut: list[Any], views: np.ndarray) -> list[Tensor]:
        out = colored(
            [torch.from_dlpack(c) for c in cut],
            views,
            self._resolutions,
            self._norm_lut,
            self._dtype,
        )
        # DALI must not use the memory again before the kernels have read it
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._release()
            self._in_use = cut, event
        return out

    # ---- images
    def _encoded(self, index: int) -> tuple[Encoded, list[Met]]:
        """The image at this index, or the next that decodes, and the files met that gave no
        image."""
        met: list[Met] = []
        if index not in self._by_pil:
            with suppress(UnreadableImage):  # PIL meets the same
                data = self._read(index)
                size = plain_jpeg_size(data)
                fits = size and 0 < size[0] * size[1] <= MOST_PIXELS
                if size and fits and not (self._exif and is_turned(data)):
                    return Encoded(np.frombuffer(data, np.uint8), size, index), met
        image, used = self._decode(index, met)
        if image is None:
            return Encoded(None, (0, 0), index), met
        return Encoded(_pnm(image), (image.height, image.width), used), met

    def _decodes(self, data: np.ndarray) -> bool:
        """Whether DALI decodes the image."""
        graph = self._decoding(1, 1, lambda image: [image])
        graph.feed_input("encoded", [data])
        try:
            graph.run()
        except RuntimeError:
            return False
        return True


def colored(
    cut: Sequence[Tensor],
    views: np.ndarray,
    resolutions: Sequence[tuple[int, int]],
    norm_lut: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`ops.color` of each resolution: V crops (B, S, S, 3) by views (B, V) become one (V_r B, 3,
    S_r, S_r) per resolution."""
    first, out = 0, []
    for n, _ in resolutions:
        part = slice(first, first + n)
        out.append(ops.color(cut[part], np.ascontiguousarray(views[:, part].T), norm_lut, dtype))
        first += n
    return out


def _pnm(image: Image.Image) -> np.ndarray:
    """An RGB image as a portable pixmap: a header before its bytes."""
    header = np.frombuffer(b"P6\n%d %d\n255\n" % image.size, np.uint8)
    return np.concatenate([header, np.asarray(image).reshape(-1)])


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a whole and well-formed JPEG of 8 bits, gray or YCbCr, which every
    decoder takes to mean the same; None if it is anything else, and so better left to PIL."""
    levels = np.frombuffer(data, np.uint8)
    follows = levels[1:][levels[:-1] == 0xFF]  # what comes after each 0xFF
    markers = np.flatnonzero(levels[:-1] == 0xFF)[
        (follows != 0) & (follows != 0xFF) & (follows & 0xF8 != 0xD0)
    ]
    if data[:2] != b"\xff\xd8":
        return None
    at, size, components, progressive, rgb, scans = 2, None, 0, False, False, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body, end = data[at + 4 : at + 2 + length], at + 2 + length
        if marker in FRAMES:
            if (
                size
                or len(body) < 6
                or body[0] != 8
                or body[5] not in (1, 3)
                or len(body) != 6 + 3 * body[5]
            ):
                return None
            size = (int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"))
            components = body[5]
            progressive = marker == PROGRESSIVE
            rgb = rgb or (components == 3 and body[6::3] != b"\1\2\3")
        elif marker == SCAN:
            scans += 1
            if (
                not size
                or (rgb and components == 3)
                or (not progressive and (scans > 1 or body[:1] != bytes([components])))
            ):
                return None
            after = markers[np.searchsorted(markers, end) :]  # behind the pixels, which hold none
            if not len(after):
                return None
            end = int(after[0])
            if data[end + 1] == END:
                return size if len(data) - end <= TAIL else None
        elif marker == ADOBE and body[:5] == b"Adobe":
            rgb |= body[11:12] != b"\1"  # 1 is YCbCr
        elif marker not in TABLES and not 0xE0 <= marker <= 0xEF or length < 2:
            return None  # another kind of frame, for example
        at = end
    return None
