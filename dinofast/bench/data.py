"""`dinofast bench-data`: how many images a second the data path makes, what they cost, and whether
that is enough."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ..config import Config
from ..data import Loader, backend_dali, backend_native, backend_pil, make_loader
from ..data.decode import UnreadableImage, decode
from ..runtime.backends import cores
from ..runtime.distributed import pick_device
from ..runtime.progress import counting
from ..runtime.terminal import printable
from ..runtime.words import counted

INTERVALS = 10  # of the measurement, at most
SAMPLE = 100  # images of which the stages are timed, at most
STAGES_SHARE = 0.2  # of the seconds, for that


@dataclass(frozen=True)
class Measured:
    """Of one process that does nothing but take batches from its loader."""

    source: str
    n_images: int
    bad_files: list[tuple[str, str]]  # path and reason
    scan_s: float
    backend: str
    backend_note: str | None
    n_workers: int
    batch_size: int
    n_crops: int
    n_counted: int  # images, in so many seconds
    seconds: float
    rates: list[float]  # images/s, by interval
    # an image, in all threads and processes; None where workers cannot be asked
    cpu_ms: float | None
    stages_ms: dict[str, float]  # an image, CPU time of one thread: read, decode, crops

    @property
    def images_per_s(self) -> float:
        return median(self.rates)


def measure(cfg: Config, seconds: float) -> Measured:
    """Take batches from the loader of a run with these options for at least so many seconds, then
    time its parts one by one.

    Nothing is written to `cfg.output_dir`. Raises ValueError for a source without images, or with
    too few for a step.
    """
    device = pick_device(cfg.device)
    with tempfile.TemporaryDirectory(prefix="dinofast-") as folder:
        start = time.perf_counter()
        loader = make_loader(
            replace(cfg, output_dir=folder),
            device=device,
            on_progress=counting("scanning files", True),
        )
        scan_s = time.perf_counter() - start
        with closing(loader), _between_batches():
            # workers finish at about the same time, batch by batch
            batches_a_round = max(1, loader.n_workers)
            _take(loader, max(2, batches_a_round))  # starts them
            ends, cpu_before_s = [time.perf_counter()], _cpu_s()
            while ends[-1] - ends[0] < seconds:
                _take(loader, batches_a_round)
                ends.append(time.perf_counter())
            cpu_after_s = _cpu_s()
        rounds = np.array_split(np.arange(len(ends) - 1), min(INTERVALS, len(ends) - 1))
        images_a_round = batches_a_round * cfg.batch_size_per_gpu
        rates = [
            len(part) * images_a_round / (ends[part[-1] + 1] - ends[part[0]]) for part in rounds
        ]
        n_counted = (len(ends) - 1) * images_a_round
        cpu_ms = (
            None
            if cpu_before_s is None or cpu_after_s is None
            else (cpu_after_s - cpu_before_s) / n_counted * 1e3
        )
        return Measured(
            cfg.data_path,
            loader.n_images,
            loader.bad_files,
            scan_s,
            loader.backend,
            loader.backend_note,
            loader.n_workers,
            cfg.batch_size_per_gpu,
            cfg.n_crops,
            n_counted,
            ends[-1] - ends[0],
            rates,
            cpu_ms,
            _stages(loader, device, seconds * STAGES_SHARE, cpu_ms or 0.0),
        )


@contextmanager
def _between_batches() -> Iterator[None]:
    """Ctrl-C takes effect at the end of `_take`: a worker that is left while it hands over a batch
    complains."""
    before = (
        signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread()
        else None
    )
    _interrupted.clear()
    if before is not None:
        signal.signal(signal.SIGINT, lambda signum, frame: _interrupted.set())
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


_interrupted = threading.Event()


def _take(loader: Loader, n: int) -> None:
    for _ in range(n):
        crops = next(loader)
        if _interrupted.is_set():
            raise KeyboardInterrupt
    if crops[0].is_cuda:
        torch.cuda.synchronize(crops[0].device)


def _cpu_s() -> float | None:
    """Seconds of CPU time of this process and its workers so far."""
    total = time.process_time()
    try:
        for worker in multiprocessing.active_children():
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            # in user and in system mode
            total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None
    return total


def _stages(
    loader: Loader, device: torch.device, seconds: float, cpu_ms: float
) -> dict[str, float]:
    """Mean CPU time an image, in ms: of images from all over the source, worked on in this thread
    as the loader does."""
    if loader.backend == "dali":
        return _stages_of_dali(loader, device, seconds, cpu_ms)
    reader = loader.reader
    spent: list[np.ndarray] = []
    on_gpu = device.type == "cuda"
    norm_lut = None if on_gpu else np.zeros((3, 256), np.float32)  # the CPU normalizes as it writes
    out = [
        torch.empty(3, side, side, dtype=torch.uint8 if on_gpu else torch.float32)
        for n, side in loader.augmentation.resolutions
        for _ in range(n)
    ]
    end = time.perf_counter() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in np.linspace(
            0, loader.n_images - 1, min(SAMPLE, loader.n_images), dtype=int
        ).tolist():
            _, index = reader.decode_next(index, [])  # the next one that decodes
            draw = loader.augmentation.draw(0, np.array([index]))
            times = [time.thread_time()]
            data = reader.dataset.read(index)
            times.append(time.thread_time())
            image = decode(data)
            times.append(time.thread_time())
            plan = draw.plan(0, image.height, image.width)
            if loader.backend == "native":
                backend_native.render(backend_native.pixels(image), plan, out, norm_lut)
            else:
                for view in plan:
                    backend_pil.render(image, view)
            times.append(time.thread_time())
            spent.append(np.diff(times) * 1e3)
            if time.perf_counter() > end:
                break
    return dict(zip(("read", "decode", "crops"), np.mean(spent, 0).tolist(), strict=True))


def _stages_of_dali(
    loader: Loader, device: torch.device, seconds: float, cpu_ms: float
) -> dict[str, float]:
    """Reading and color by themselves; the rest of `cpu_ms` is the graph's, whose threads cannot be
    asked."""
    n_images, resolutions = loader.batch_size, loader.augmentation.resolutions
    indices = np.arange(n_images) % loader.n_images
    drawn, norm_lut = loader.augmentation.draw(0, indices).views, torch.zeros(3, 256, device=device)
    cut = [
        torch.zeros(n_images, side, side, 3, dtype=torch.uint8, device=device)
        for n, side in resolutions
        for _ in range(n)
    ]
    spent: list[np.ndarray] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not spent:
        times = [time.process_time()]
        for index in indices.tolist():
            with suppress(UnreadableImage):
                loader.reader.dataset.read(index)
        times.append(time.process_time())
        backend_dali.colored(cut, drawn, resolutions, norm_lut, loader.dtype)
        times.append(time.process_time())
        spent.append(np.diff(times) / n_images * 1e3)
    read_ms, color_ms = np.mean(spent, 0).tolist()
    return {
        "read": read_ms,
        "decode and cut": max(0.0, cpu_ms - read_ms - color_ms),
        "color": color_ms,
    }


def report(measured: Measured, wanted: float | None) -> str:
    """Plain text, one fact a line; the last is whether the data keeps up with training at `wanted`
    images/s."""
    m = measured
    workers = (
        counted(m.n_workers, *(("process", "processes") if m.backend == "pil" else ("thread",)))
        if m.n_workers
        else "in the main thread"
    )
    lines = [f"source: '{m.source}', {counted(m.n_images, 'image')}, listed in {m.scan_s:.2f} s"]
    if m.bad_files:
        path, reason = m.bad_files[-1]
        lines.append(
            f"{counted(len(m.bad_files), 'bad file')} replaced or left out; the last: "
            f"{printable(path)} ({reason})"
        )
    lines += [
        f"crops: {m.backend}, {workers}{f' ({m.backend_note})' if m.backend_note else ''}; "
        f"{counted(m.n_crops, 'crop')} an image, {counted(m.batch_size, 'image')} a batch, "
        f"{counted(cores(), 'core')}",
        f"speed: {_short(m.images_per_s)} images/s, median of "
        f"{counted(len(m.rates), 'interval')} from {_short(min(m.rates))} to "
        f"{_short(max(m.rates))}; {counted(m.n_counted, 'image')} in {m.seconds:.1f} s",
        f"CPU time an image, {'by stage' if m.backend == 'dali' else 'one thread alone'}: "
        + ", ".join(f"{stage} {ms:.2f} ms" for stage, ms in m.stages_ms.items()),
    ]
    if m.cpu_ms is not None:
        lines.append(f"CPU time an image, all in all: {m.cpu_ms:.2f} ms")
    return "\n".join([*lines, verdict(m, wanted)])


def verdict(measured: Measured, wanted: float | None) -> str:
    m, rate = measured, _short(measured.images_per_s)
    if wanted is None:
        return f"enough for training at up to {rate} images/s"
    if m.images_per_s >= wanted:
        return f"keeps up with {_short(wanted)} images/s"
    needed = math.ceil(wanted * (m.cpu_ms or sum(m.stages_ms.values())) / 1e3)
    if needed > min(cores(), m.n_workers):
        way_out = f"{counted(needed, 'core')} of this kind would do"
    else:  # they are here, and wait
        way_out = (
            f"{counted(needed, 'core')} would do, so the files come too slowly, or something else "
            "takes the cores"
        )
    return f"does not keep up: {rate} of {_short(wanted)} images/s; {way_out}"


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
