"""Memory of the process: kept from step to step on a CPU, and how much of it was taken at most."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
