"""Memory of the process: kept from step to step on a CPU, how much of it was taken at most, and
what worker processes may share."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

OVERHEAD = 2**16  # bytes of a worker there: whole pages, and its queues' semaphores
SHARED_MEMORY = "/dev/shm"  # through which worker processes pass tensors, on Linux
# Numbers of malloc.h, and what glibc comes to by itself for blocks of this size: 32 MiB, and twice
# that.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}


@contextmanager
def retain_freed_memory(device: torch.device) -> Iterator[None]:
    """While this lasts, memory that is freed stays with the process, for the next step, where that
    is a CPU's and glibc's.

    A block of 32 MiB and more, as packed activations are, is otherwise fetched from the system at
    each use, page by page: steps of blocks of ViT-S/16 with 16 images take 1.12 times as long
    (benchmarks/paths.py, one thread of an AMD EPYC, 2026-11-27). With 8 images no block is much
    larger, and malloc mostly finds room between smaller ones: 1.01 times. csrc/cpu/recycled.h is
    for those who take the loss alone. Whoever has set malloc by its environment variables is left
    alone.
    """
    libc = _libc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and nobody has told its malloc what to do."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018 - whether they are there
    except (OSError, AttributeError, TypeError):
        return None
    return libc


def peak_memory(device: torch.device) -> str:
    """The most memory that tensors have taken on a GPU so far, or the process itself on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform == "darwin" else 1
    )
    return f"{kib / 2**20:.2f} GiB of this process"


def fewer_workers(wanted: int, bytes_ahead_per_worker: int) -> tuple[int, str | None]:
    """How many worker processes fit into the shared memory that is free now, and a sentence if they
    are fewer than wanted.

    bytes_ahead_per_worker: of the tensors that one makes before they are taken (prefetch_factor
    batches). As much again is left for those that have been taken and are still in use. A worker
    that writes more than there is dies of SIGBUS or waits without end; a container has 64 MiB
    unless it is started with --shm-size.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not Linux: another mechanism
        return wanted, None
    each = bytes_ahead_per_worker + OVERHEAD
    fitting = max(0, min(wanted, free // each - 1))
    if fitting == wanted:
        return wanted, None
    how_many = f"only {fitting} start" if fitting else "none starts, this process does their work"
    return fitting, (
        f"{SHARED_MEMORY} has {free / 2**20:,.0f} MiB free, too little for {wanted} worker "
        f"processes that need {each / 2**20:,.1f} MiB each: {how_many}; in a "
        "container --shm-size 8g gives more."
    )


def share(tensors: Iterable[Tensor]) -> None:
    """In a worker process: put them into shared memory now. Where that is full an error says so;
    torch does it later, in a thread whose errors nobody hears, and the reader waits without end."""
    if get_worker_info() is None:
        return
    for tensor in tensors:
        tensor.share_memory_()


def why_workers_ended(error: RuntimeError) -> str | None:
    """In words, where that is what torch's error says, which has no type of its own."""
    if "shared memory" in str(error):
        return f"{SHARED_MEMORY} is full, through which worker processes pass images"
    if "DataLoader worker" in str(error):
        return "a data worker was killed, often for lack of memory"
    return None
