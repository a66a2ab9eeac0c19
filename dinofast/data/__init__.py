"""The data path: `make_loader` gives the crops of a pretraining run, batch by batch, on the device."""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dinofast import ops
from dinofast.config import Config
from dinofast.data import dali, index, native, pil, plan
from dinofast.data.native import Refusals, Task
from dinofast.runtime.backends import cores
from dinofast.runtime.side_stream import SideStream


def make_loader(cfg: Config, *, rank: int = 0, world: int = 1, start_step: int = 0, device: str | torch.device = "cpu",
                on_progress: Callable[[int, int], None] | None = None) -> Loader:
    """The crops of process `rank` of `world`, from optimiser step `start_step` on; see `Loader`.

    Looks at every file first, calling `on_progress(done, total)` now and then; `output_dir/index.npz` keeps what it finds, so
    that the next time only new and changed files are looked at. Raises `ValueError` if the source is missing or holds no
    images, if more than the share `cfg.max_refused` of them is unreadable, or if they do not fill one step.
    """
    return Loader(cfg, rank, world, start_step, torch.device(device), on_progress)


class Loader:
    """Endless iterator over micro-batches, across epochs.

    `next(loader)` gives one tensor per resolution, crop-major (crop 0 of all images, crop 1 of all images, ...), normalised, on
    the device: [(2B, 3, G, G), ((V-2)B, 3, L, L)], or the first alone without local crops; float32, or bfloat16 where one of
    our ViTs trains in bf16, whose first layer rounds to it anyway. An optimiser step takes `cfg.accumulate` of them. The
    crops depend only on the images, the seed and the global batch, so a run that starts at step s, on any number of processes
    with the same global batch, sees what an unbroken run sees from step s on.

    On a GPU the copies and kernels that this takes go to a stream of their own, beside the step that the device is still at;
    the current stream waits for them, the host does not.

    A file that fails to decode is replaced by the next one in the index that decodes, drawn as that sample is drawn. It goes
    into `refused` and `output_dir/refused.txt`; more of them than `cfg.max_refused` allows raise `ValueError`.

    n_images: images found usable by the index pass. fingerprint: equal for the same images in the same order. steps_per_epoch:
    optimiser steps; an incomplete last batch is left out.
    batch_size, dtype: of a micro-batch. refused: (path, reason) of each file refused so far in this process. backend,
    backend_note: what makes the crops, and why not something faster. crops: what is in a micro-batch. n_workers: threads or
    processes.
    """

    def __init__(self, cfg: Config, rank: int, world: int, start_step: int, device: torch.device,
                 on_progress: Callable[[int, int], None] | None) -> None:
        found, self.refused = index.build(cfg.data_path, cfg.max_refused, on_progress,
                                          os.path.join(cfg.output_dir, "index.npz"))
        self.n_images, self.fingerprint = len(found), found.fingerprint
        global_batch = cfg.batch_size_per_gpu * world * cfg.accumulate
        self.steps_per_epoch = self.n_images // global_batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"--data_path {cfg.data_path} has {self.n_images:,} usable images but one step takes {global_batch:,} "
                f"(--batch_size_per_gpu {cfg.batch_size_per_gpu} x {world} processes x --accumulate {cfg.accumulate}): "
                "lower --batch_size_per_gpu.")
        self._max_refused, self._n_listed = cfg.max_refused, self.n_images + len(self.refused)
        self._refused_file, self._rank = os.path.join(cfg.output_dir, "refused.txt"), rank
        self._device, self._step, self._batches = device, start_step, None
        self._side, self._blocked_s = SideStream(device) if device.type == "cuda" else None, 0.0
        self._mean, self._std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (cfg.image_mean, cfg.image_std))
        self.backend, self.backend_note = choose_backend(cfg.data_backend, device.type)
        self.dtype = torch.bfloat16 if cfg.vit and cfg.precision_on(device.type) == "bf16" else torch.float32
        self.batch_size, self._hw_decoder_load = cfg.batch_size_per_gpu, cfg.hw_decoder_load
        self.crops = Crops(found, cfg.seed, views(cfg))
        self.n_workers = min(cfg.num_workers, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        self._tasks = partial(tasks, cfg, rank, world, n=self.n_images, steps_per_epoch=self.steps_per_epoch)

    def seek(self, step: int) -> None:
        """Go on from this optimiser step of the run. Costs nothing before the first batch, which starts the workers."""
        if self._batches is not None:
            self.close()
        self._step, self._batches = step, None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[torch.Tensor]:
        return self._side.run(self._next) if self._side else self._next()

    @property
    def wait_s(self) -> float:
        """Seconds for which training has waited for crops so far, the start of the workers included.

        On a GPU the device's: in each `next`, from the end of what was enqueued before it until the crops were there. So what
        passes while the device is still at a step does not count, and the rest of a copy does. Asking does not wait: what the
        device has yet to come to counts next time. On a CPU, where `next` and the step take turns: the host's, until the crops
        were made.
        """
        return self._side.wait_s() if self._side else self._blocked_s

    def _next(self) -> list[torch.Tensor]:
        start = time.perf_counter()
        if self._batches is None:
            self._start()
        crops, refusals = next(self._batches)
        self._blocked_s += time.perf_counter() - start
        if refusals:
            self._refuse(refusals)
        if not crops:
            raise ValueError(f"None of the {self.n_images:,} images decodes any more: see {self._refused_file} for reasons.")
        on_device = [c.to(self._device, non_blocking=True) for c in crops]  # torch keeps pinned memory until it is copied
        return [c if c.dtype == self.dtype else self._finished(c) for c in on_device]

    def _start(self) -> None:
        os.makedirs(os.path.dirname(self._refused_file), exist_ok=True)
        if self._rank == 0:
            _record(self._refused_file, self.refused, anew=True)
        _OPEN.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)                          # once, and before what multiprocessing does at exit
        tasks, pinned, crops = self._tasks(start_step=self._step), self._device.type == "cuda", self.crops
        levels = torch.arange(256, dtype=torch.uint8, device=self._device).expand(1, 3, 1, 256)
        table = self._normalise(levels).view(3, 256)
        self._table = table.to(self.dtype)
        if self.backend == "dali":
            self._batches = dali.Batches(tasks, crops.draw, crops.index.read, crops.decode, crops.index.sizes,
                                         crops.resolutions, table, self.dtype, self._device, self.batch_size,
                                         self.n_workers, self._hw_decoder_load)
            return
        if self.backend == "native":                         # a GPU normalises in no time: it gets the levels
            self._batches = native.Batches(tasks, crops.draw, crops.decode, crops.resolutions,
                                           None if pinned else table.numpy(), self.dtype, pinned, self.n_workers)
            return
        generator = torch.Generator()  # iter() takes a number from it: leave the global generator alone
        self._batches = iter(DataLoader(crops, batch_size=None, sampler=tasks, num_workers=self.n_workers,
                                        collate_fn=_as_it_is, worker_init_fn=_ignore_signals, pin_memory=pinned,
                                        generator=generator))

    def close(self) -> None:
        """End the worker processes. Only `seek` makes the loader usable again."""
        batches, self._batches = self._batches, iter(())
        if isinstance(batches, native.Batches | dali.Batches):
            batches.close()
        elif hasattr(batches, "_workers"):  # torch has no public way to end them at a known moment
            batches._shutdown_workers()  # waits for the batch at hand, a few seconds at most
            for worker in batches._workers:  # a stuck one ignores the SIGTERM that torch sends
                worker.kill()
                worker.join()

    def _normalise(self, crops: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, S, S) to float32, in the steps of torchvision's ToTensor and Normalize."""
        return crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(self._mean).div_(self._std)

    def _finished(self, crops: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, S, S) as the model takes them; on a GPU in one pass over memory instead of five, to the same bits."""
        return ops.normalize(crops, self._table) if crops.is_cuda else self._normalise(crops).to(self.dtype)

    def _refuse(self, refusals: Refusals) -> None:
        known = dict(self.refused)
        new = [(path, reason) for path, reason in dict(refusals).items() if path not in known]  # each worker meets it
        self.refused += new
        _record(self._refused_file, new)
        index.check_share(self.refused, self._n_listed, self._max_refused)


class Crops(Dataset):
    """What is in a micro-batch. As a data set of tasks, with PIL: uint8 crops, one array (V_r B, 3, S_r, S_r) per resolution,
    and the files refused on the way."""

    def __init__(self, found: index.Index, seed: int, views: tuple[plan.View, ...]) -> None:
        self.index, self.seed, self.views = found, seed, views
        self.bad: set[int] = set()  # samples that failed, so that each is tried once
        self.resolutions = [(len(group), group[0].size) for group in (views[:2], views[2:]) if group]

    def draw(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """The plan (B, V) of samples (B,)."""
        return plan.draw(self.seed, epoch, samples, self.index.sizes[samples], self.views)

    def __getitem__(self, task: Task) -> tuple[list[torch.Tensor], Refusals]:
        epoch, samples = task
        drawn = self.draw(epoch, samples)
        crops = [np.empty((n, len(samples), side, side, 3), np.uint8) for n, side in self.resolutions]
        places = [place for c in crops for place in c]  # V arrays (B, S, S, 3)
        refusals: Refusals = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
            for b, sample in enumerate(samples.tolist()):
                image, used = self.decode(sample, refusals)
                if image is None:
                    return [], refusals
                row = drawn[b] if used == sample else self.draw(epoch, np.array([used]))[0]
                for place, view in zip(places, row, strict=True):
                    place[b] = pil.render(image, view)
        return [torch.from_numpy(c).flatten(0, 1).permute(0, 3, 1, 2) for c in crops], refusals

    def decode(self, sample: int, refusals: Refusals) -> tuple[Image.Image | None, int]:
        """The image of the first sample, from this one on and round the index, that decodes, and which it is."""
        for used in itertools.chain(range(sample, len(self.index)), range(sample)):
            if used in self.bad:
                continue
            try:
                image = pil.decode(self.index.read(used))
                if image.size[::-1] != tuple(self.index.sizes[used]):  # the plan's boxes would not fit
                    raise pil.Refused("its size has changed since the index pass")
                return image, used
            except pil.Refused as reason:
                self.bad.add(used)
                refusals.append((self.index.path(used), str(reason)))
        return None, sample


def choose_backend(asked: str | None, device_type: str) -> tuple[str, str]:
    """Which backend executes the plan, and why not a faster one. Raises `ValueError` if what was asked for cannot run here."""
    reasons = {"dali": dali.missing(), "native": native.missing(), "pil": ""}
    if asked and reasons[asked]:
        raise ValueError(f"--data_backend {asked} was asked for, but {reasons[asked]}.")
    by_speed = ["dali", "native", "pil"] if device_type == "cuda" else ["native", "pil"]  # on a CPU DALI is for tests
    best = asked or next(backend for backend in by_speed if not reasons[backend])
    return best, "" if asked else "; ".join(reasons[backend] for backend in by_speed[: by_speed.index(best)])


def views(cfg: Config) -> tuple[plan.View, ...]:
    """The official kinds of crop: two global ones, which differ in blur and solarisation, and the local ones."""
    big, small, blur = cfg.global_crops_size, cfg.local_crops_size, cfg.blur_radius
    first = plan.View(big, cfg.global_crops_scale, blur_p=1.0, solarise_p=0.0, blur_radius=blur)
    second = plan.View(big, cfg.global_crops_scale, blur_p=0.1, solarise_p=0.2, blur_radius=blur)
    local = plan.View(small, cfg.local_crops_scale, blur_p=0.5, solarise_p=0.0, blur_radius=blur)
    return first, second, *[local] * cfg.local_crops_number


def tasks(cfg: Config, rank: int, world: int, start_step: int, n: int, steps_per_epoch: int) -> Iterator[Task]:
    """The micro-batches of one process: number m of rank r takes B rows of the global batch, from row (m world + r) B on."""
    b, drawn = cfg.batch_size_per_gpu, -1
    for step in itertools.count(start_step):
        epoch, row = divmod(step, steps_per_epoch)
        if epoch != drawn:
            order, drawn = plan.epoch_order(cfg.seed, epoch, n), epoch
        for m in range(cfg.accumulate):
            start = ((row * cfg.accumulate + m) * world + rank) * b
            yield epoch, order[start : start + b]


def _record(path: str, refusals: Refusals, anew: bool = False) -> None:
    """Add refused files to the list at `path`, once each, whichever process comes first; `anew` begins with an empty one."""
    if anew and not refusals:
        with suppress(FileNotFoundError):
            os.remove(path)  # nothing refused, no list
    if not refusals:
        return
    lines = {name.translate(_IN_A_LINE): reason for name, reason in refusals}
    with open(path, "a+", encoding="utf-8", errors="surrogateescape") as file:
        with suppress(OSError):  # some network file systems have no locks: at worst a file is listed twice
            fcntl.flock(file, fcntl.LOCK_EX)
        if anew:
            file.truncate(0)
        file.seek(0)
        listed = {line.split("\t")[0] for line in file}
        file.writelines(f"{name}\t{reason}\n" for name, reason in lines.items() if name not in listed)


_IN_A_LINE = str.maketrans({"\n": r"\n", "\r": r"\r", "\t": r"\t"})  # file names may hold anything


_OPEN: weakref.WeakSet[Loader] = weakref.WeakSet()  # loaders with workers


def _close_all() -> None:
    """At exit multiprocessing would send the workers SIGTERM, which they ignore, and wait for them."""
    for loader in list(_OPEN):
        loader.close()


def _as_it_is(batch: object) -> object:
    return batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent answers them and then calls `close`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
