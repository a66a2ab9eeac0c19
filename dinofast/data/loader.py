"""The crops of a pretraining run, batch by batch, on the device: `make_loader`."""

from __future__ import annotations

import atexit
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dinofast import ops
from dinofast.config import Config
from dinofast.data import backend_dali, backend_native, backend_own, dataset, shared
from dinofast.data.augmentation import Augmentation
from dinofast.data.backend_pil import CropDataset
from dinofast.data.bad_images import BadImages
from dinofast.data.choices import select_backend, views
from dinofast.data.decode import BadFiles
from dinofast.data.held_out import held_out_crops
from dinofast.data.items import ItemDataset, ItemReader, MapStyle
from dinofast.data.reader import ImageReader, Met
from dinofast.data.sampler import batch_indices
from dinofast.runtime.backends import cores
from dinofast.runtime.distributed import local_world
from dinofast.runtime.memory import fewer_workers
from dinofast.runtime.side_stream import SideStream
from dinofast.runtime.words import counted

PREFETCH = 2  # micro-batches that a worker process has ready
# crops, files that gave none, images that were replaced
Batches = Iterator[tuple[list[torch.Tensor], list[Met], int]]


def make_loader(
    cfg: Config,
    *,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
    items: MapStyle | None = None,
    augment: backend_own.Augment | None = None,
) -> Loader:
    """The crops of process `rank` of `world`, from optimizer step `start_step` on; see `Loader`.
    items, augment: a data set and an augmentation of the caller's own.

    Lists the files first, calling `on_progress(done, total)` now and then (total 0: not known yet).
    Raises `ValueError` if the source is missing or has no images, if they do not fill one step, or
    if more than the share `cfg.max_bad_files` of its shards is damaged.
    """
    where = torch.device(device)
    return Loader(cfg, rank, world, start_step, where, on_progress, items, augment)


class Loader:
    """Endless iterator over micro-batches, across epochs.

    `next(loader)` gives one tensor per resolution, crop-major (crop 0 of all images, crop 1 of all
    images, ...), normalized, on the device: [(2B, 3, G, G), ((V-2)B, 3, L, L)], or the first alone
    without local crops; float32, or bfloat16 where one of our ViTs trains in bf16, whose first
    layer rounds to it anyway. An optimizer step takes `cfg.accumulate` of them. The crops depend
    only on the files, the seed and the global batch, so a run that starts at step s, on any number
    of processes with the same global batch, sees what an unbroken run sees from step s on.

    On a GPU the copies and kernels that this takes go to a stream of their own, beside the step
    that the device is still at; the current stream waits for them, the host does not.

    A file that does not decode is replaced by the next one, cyclically, that does, drawn as that
    one is drawn. It goes into `bad_files` and `output_dir/bad_files.txt`, to which a run that goes
    on adds. `next` raises `ValueError` if none decodes at the start, `OSError` if none does any
    more, or if more than the share `cfg.max_bad_files` of the images that this process has drawn so
    far is bad: more than chance explains (CHANCE), and not before it has drawn ENOUGH_DRAWN, or all
    of an epoch that are its own.

    A file that cannot be read for the moment is replaced likewise, but only this time: it is
    neither listed nor part of the share. That alone may differ between a run that was resumed and
    one that was not. `next` raises `OSError` once no file can be read for UNREAD_S.

    n_images: files listed, good and bad. fingerprint: equal for the same names in the same order.
    steps_per_epoch: optimizer steps; an incomplete last batch is left out. batch_size, dtype: of a
    micro-batch. bad_files: (path, reason) of each met so far in this process, but for those that
    a run that this one goes on with has listed. n_unread, unread_reason: images replaced because
    they could not be read at their turn, and why the last. backend, backend_note:
    what makes the crops, and why not something faster. reader, augmentation: what reads the images
    and what is drawn for them. n_workers: threads or processes. ignored: what else lies in the
    source, counted by kind, in a sentence or "".
    """

    def __init__(
        self,
        cfg: Config,
        rank: int,
        world: int,
        start_step: int,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None,
        items: MapStyle | None = None,
        augment: backend_own.Augment | None = None,
    ) -> None:
        images: dataset.ImageDataset | ItemDataset
        if items is None:
            images, self._unlink = shared.between_ranks(dataset.scan(cfg.data_path, on_progress))
        else:
            images, self._unlink = ItemDataset(items), lambda: None
        self.n_images = len(images)
        self._source = f"`data_path` {cfg.data_path}" if items is None else "the data set"
        self.fingerprint = images.fingerprint
        self.ignored = images.ignored
        self._bad = BadImages(
            images.bad_files,
            self.n_images,
            cfg.max_bad_files,
            os.path.join(cfg.output_dir, "bad_files.txt"),
            self._source,
            " of this process" if world > 1 else "",
        )
        global_batch = cfg.batch_size_per_gpu * world * cfg.accumulate
        self.steps_per_epoch = self.n_images // global_batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"{self._source} has {counted(self.n_images, 'image')} but one step "
                f"takes {global_batch:,} (`batch_size_per_gpu` {cfg.batch_size_per_gpu} x "
                f"{counted(world, 'process', 'processes')} x `accumulate` {cfg.accumulate}): lower "
                "`batch_size_per_gpu`."
            )
        self._bad.n_own = self.steps_per_epoch * cfg.batch_size_per_gpu * cfg.accumulate
        self._rank = rank
        self._device, self._step = device, start_step
        self._batches: Batches | None = None
        self._side, self._blocked_s = SideStream(device) if device.type == "cuda" else None, 0.0
        self._waits_since = 0.0
        self._mean, self._std = (
            torch.tensor(c, device=device).view(-1, 1, 1) for c in (cfg.image_mean, cfg.image_std)
        )
        self.backend, self.backend_note = select_backend(cfg.data_backend, device.type)
        self.dtype = (
            torch.bfloat16 if cfg.vit and cfg.precision_on(device.type) == "bf16" else torch.float32
        )
        self.batch_size, self._hw_decoder_load = cfg.batch_size_per_gpu, cfg.hw_decoder_load
        read_as = cfg.given_value_range, cfg.exif
        if isinstance(images, ItemDataset) or cfg.in_channels != 3:
            self.reader: ImageReader = ItemReader(images, cfg.in_channels, *read_as)
        else:
            self.reader = ImageReader(images, *read_as)
        self.augmentation, self._exif = Augmentation(cfg.seed, views(cfg)), cfg.exif
        self._own: backend_own.OwnCrops | None = None
        if augment or isinstance(self.reader, ItemReader):
            self._use_own(cfg, augment)
        self.n_workers = min(cfg.num_workers, max(1, cores() // local_world()))
        self.workers_note = None
        if self.backend in ("pil", "own"):
            sides = [view.size for view in self.augmentation.views]
            values = cfg.in_channels * (4 if self._own and not self._own.makes_levels else 1)
            batch = self.batch_size * sum(values * side * side for side in sides)
            self.n_workers, self.workers_note = fewer_workers(self.n_workers, PREFETCH * batch)
        self._indices = partial(
            batch_indices,
            cfg.seed,
            self.n_images,
            self.steps_per_epoch,
            batch_size=self.batch_size,
            accumulate=cfg.accumulate,
            rank=rank,
            world=world,
        )

    def _use_own(self, cfg: Config, augment: backend_own.Augment | None) -> None:
        """Crops in worker processes, by whatever the caller gave. Tries it on the first image."""
        if cfg.data_backend not in (None, "pil"):
            raise ValueError(
                f"`data_backend` {cfg.data_backend} is for files of three channels and our "
                "augmentation: leave it out."
            )
        self._own = backend_own.OwnCrops(
            self.augmentation, self.reader.decode_next, augment, cfg.image_mean, cfg.image_std
        )
        own, workers = self._own, min(cfg.num_workers, 1)
        ((own.makes_levels, fault, met),) = backend_own.in_processes(own.try_out, [0], workers)
        if met:
            raise self._bad.nothing(met)
        if fault:
            raise ValueError(fault)
        self.reader.forget()
        self.backend, self.backend_note = "own", None

    def seek(self, step: int) -> None:
        """Go on from this optimizer step of the run. Costs nothing before the first batch, which
        starts the workers."""
        if self._batches is not None:
            self.close()
        self._step, self._batches = step, None

    def remarks(self) -> list[str]:
        """Sentences to be told before the first step by the first process: what of the source is
        ignored, whether nearly all images are black or white, and why fewer workers start."""
        dark = self.reader.remark() if self._rank == 0 else ""
        lines = self.ignored, dark and f"warning: {dark}", self.workers_note
        return [line for line in lines if line]

    def begin_run(self) -> None:
        """Of a new run: remove the `bad_files.txt` of an earlier one. By one process, before any
        takes a batch."""
        self._bad.begin_run()

    @property
    def bad_files(self) -> BadFiles:
        return self._bad.new

    @property
    def n_unread(self) -> int:
        return self._bad.n_unread

    @property
    def unread_reason(self) -> str:
        return self._bad.unread_reason

    def all_are_here(self, all_equal: Callable[[int], bool]) -> None:
        """Every process of this machine has its loader: what they share needs no name in the file
        system any more. Raises `ValueError` if they see different images. all_equal: whether every
        process has the same number."""
        same = all_equal(int(self.fingerprint, 16) >> 66)
        self._unlink()
        if not same:
            raise ValueError(
                f"process {self._rank} finds {counted(self.n_images, 'image')} in "
                f"{self._source}, others find different ones: all processes must see the same "
                "images."
            )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[torch.Tensor]:
        return self._side.run(self._next) if self._side else self._next()

    @property
    def wait_s(self) -> float:
        """Seconds for which training has waited for crops so far, the start of the workers
        included.

        On a GPU the device's: in each `next`, from the end of what was enqueued before it until the
        crops were there. So what passes while the device is still at a step does not count, and the
        rest of a copy does. Asking does not wait: what the device has yet to come to counts next
        time. On a CPU, where `next` and the step take turns: the host's, until the crops were made.
        """
        return self._side.wait_s() if self._side else self._blocked_s

    def waited_s(self) -> float:
        """Seconds for which `next` has been waiting for a batch; 0 while it is not."""
        return time.perf_counter() - self._waits_since if self._waits_since else 0.0

    def _next(self) -> list[torch.Tensor]:
        start = self._waits_since = time.perf_counter()
        try:
            if self._batches is None:
                self._start()
            assert self._batches is not None
            crops, met, n_replaced = next(self._batches)
        finally:
            self._waits_since = 0.0
        self._blocked_s += time.perf_counter() - start
        if not crops:
            raise self._bad.nothing(met)
        self._bad.drawn(self.batch_size, n_replaced, met)
        # torch keeps pinned memory until it is copied
        on_device = [c.to(self._device, non_blocking=True) for c in crops]
        return [self.finished(c) for c in on_device]

    def _start(self) -> None:
        self._unlink()
        self._bad.begin(self._rank == 0)
        _OPEN.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)  # once, and before what multiprocessing does at exit
        indices, pinned = self._indices(start_step=self._step), self._device.type == "cuda"
        draw = self.augmentation.draw
        decode = self.reader.decode_next
        resolutions = self.augmentation.resolutions
        n = len(self._mean)
        levels = torch.arange(256, dtype=torch.uint8, device=self._device).expand(1, n, 1, 256)
        norm_lut = self._normalize(levels).view(n, 256)
        self._norm_lut = norm_lut.to(self.dtype)
        if self.backend == "dali":
            self._batches = backend_dali.Batches(
                indices,
                draw,
                self.reader.dataset.read,
                decode,
                resolutions,
                norm_lut,
                self.dtype,
                self._device,
                self.batch_size,
                self.n_workers,
                self._hw_decoder_load,
                self._exif,
            )
        elif self.backend == "native":  # a GPU normalizes in no time: it gets the levels
            self._batches = backend_native.Batches(
                indices,
                draw,
                decode,
                resolutions,
                None if pinned else norm_lut.numpy(),
                self.dtype,
                pinned,
                self.n_workers,
            )
        else:
            crops = self._own or CropDataset(self.augmentation, decode)
            # iter() takes a number from it: leave the global generator alone
            generator = torch.Generator()
            self._batches = iter(
                DataLoader(
                    crops,
                    batch_size=None,
                    sampler=indices,
                    num_workers=self.n_workers,
                    prefetch_factor=PREFETCH if self.n_workers else None,
                    collate_fn=backend_own.as_it_is,
                    worker_init_fn=_ignore_signals,
                    pin_memory=pinned,
                    generator=generator,
                )
            )

    def held_out_crops(
        self, indices: Sequence[int], threads: int
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        """See `held_out.held_out_crops`; for `finished`."""
        return held_out_crops(self.reader, self.augmentation, self._own, indices, threads)

    def close(self) -> None:
        """End the worker processes. Only `seek` makes the loader usable again."""
        batches, self._batches = self._batches, iter(())
        if isinstance(batches, backend_native.Batches | backend_dali.Batches):
            batches.close()
        # torch has no public way to end them at a known moment
        elif isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()  # waits for the batch at hand, a few seconds at most
            for worker in batches._workers:  # a stuck one ignores the SIGTERM that torch sends
                worker.kill()
                worker.join()

    def _normalize(self, crops: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, S, S) to float32, in the steps of torchvision's ToTensor and Normalize."""
        return (
            crops.to(torch.float32, memory_format=torch.contiguous_format)
            .div_(255)
            .sub_(self._mean)
            .div_(self._std)
        )

    def finished(self, crops: torch.Tensor) -> torch.Tensor:
        """Levels, uint8 (N, 3, S, S), as the model takes them; on a GPU in one pass over memory
        instead of five, to the same bits. What is normalized already only in its dtype."""
        if crops.dtype != torch.uint8:
            return crops.to(self.dtype)
        return (
            ops.normalize(crops, self._norm_lut)
            if crops.is_cuda and crops.shape[1] == 3
            else self._normalize(crops).to(self.dtype)
        )


_OPEN: weakref.WeakSet[Loader] = weakref.WeakSet()  # loaders with workers


def _close_all() -> None:
    """At exit multiprocessing would send the workers SIGTERM, which they ignore, and wait for
    them."""
    for loader in list(_OPEN):
        loader.close()


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent answers them and
    then calls `close`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
