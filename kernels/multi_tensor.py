"""One launch for any set of tensors: the tables that its programs read on the device.

A tensor is known by its address in a table on the device, whatever its layout; only one that
differs in dtypes costs another launch. A program takes a chunk of one tensor, told by a table of
chunks. Both tables are kept: the chunks as long as the sizes are the same, the addresses until one
changes, which a gradient's does when it is freed between steps. They travel from pinned memory
without waiting; torch's pinned allocator keeps it until the copy is done. An address from a table
says nothing about its alignment, and without 16 bytes of it there are no 128-bit loads: the host
looks at all of a call, and a view that lies askew (a gradient in a bucket of DDP) sends the call
to a second configuration.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    None: None,
}


@triton.jit
def chunk_at(chunks, sizes, at, BLOCK: tl.constexpr):
    """Of chunk `at`: its tensor, its first number, and how many there are from there on."""
    tensor = tl.load(chunks + 2 * at)
    begin = tl.load(chunks + 2 * at + 1).to(tl.int64) * BLOCK
    return tensor, begin, tl.load(sizes + tensor) - begin


@triton.jit
def tensor_at(table, row, tensor, n, begin, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to number `begin` of a tensor, and whether there is such a tensor; VECTOR numbers are
    loaded at a time."""
    address = tl.load(table + row * n + tensor)
    # bytes
    x = tl.multiple_of(address.to(tl.pointer_type(dtype)), VECTOR * dtype.primitive_bitwidth // 8)
    # a plain comparison is a number to Triton 3.9's interpreter
    return x + begin, tl.where(address != 0, True, False)


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """On the device without waiting for it."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


class Tables:
    """What launches read on the device for n tensors of certain sizes and kinds: chunks, sizes, and
    the addresses last seen."""

    def __init__(
        self, device: torch.device, sizes: tuple[int, ...], kinds: tuple[Hashable, ...], block: int
    ) -> None:
        self.device, self.launches = device, []  # launches: (kind, first chunk, number of chunks)
        members: dict[Hashable, list[int]] = {}
        for i, kind in enumerate(kinds):
            members.setdefault(kind, []).append(i)
        chunks, starts, end = [], [0] * len(sizes), 0
        for kind, tensors in members.items():
            first = end
            for i in tensors:
                starts[i], count = end, triton.cdiv(sizes[i], block)
                chunks.append(torch.stack((torch.full((count,), i), torch.arange(count)), 1))
                end += count
            if end > first:
                self.launches.append((kind, first, end - first))
        self.n_chunks = end
        self.chunks = _upload(torch.cat(chunks).int(), device)  # (chunks, 2)
        self.sizes, self.starts = _upload(torch.tensor([sizes, starts]), device)  # (n,) each
        self._seen: tuple[list[int], Tensor | None, bool] = [], None, False

    def addresses(
        self, *rows: Sequence[Tensor | None], counters: Sequence[Tensor] = ()
    ) -> tuple[Tensor, bool]:
        """The table (rows, n), counters last, and whether the addresses of all others are multiples
        of 16 bytes."""
        now = [0 if x is None else x.data_ptr() for row in (*rows, counters) for x in row]
        seen, table, aligned = self._seen
        if now != seen:
            table = _upload(
                torch.frombuffer(array("q", now), dtype=torch.int64).clone(), self.device
            )
            aligned = _are_aligned(now[: len(now) - len(counters)])
            self._seen = now, table, aligned
        return table, aligned


def _are_aligned(addresses: list[int]) -> bool:
    return not any(address % 16 for address in addresses)


@lru_cache(maxsize=64)
def _tables_on_stream(
    device: torch.device,
    stream: int,
    sizes: tuple[int, ...],
    kinds: tuple[Hashable, ...],
    block: int,
) -> Tables:
    """Uploads are ordered with the launches of their own stream only: each stream has its own."""
    return Tables(device, sizes, kinds, block)


def tables_of(tensors: Sequence[Tensor], kinds: tuple[Hashable, ...], block: int) -> Tables:
    """kinds: one a tensor; those of a kind share a launch. block: numbers a chunk. Kept for the
    next call."""
    device = tensors[0].device
    # the replay would write where tables once led
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "adamw_ema_, ema_ and grad_norms cannot be captured in a CUDA graph: the addresses of "
            "their tensors lie in tables of the host's keeping; leave the optimizer's step outside "
            "the graph."
        )
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _tables_on_stream(device, stream, tuple([x.numel() for x in tensors]), kinds, block)


def dtypes_of(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    return [None if x is None else x.dtype for x in tensors]
