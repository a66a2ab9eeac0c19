"""normalize: the levels of crops that are finished, each looked up in a table of its channel.

    out[n, c, y, x] = norm_lut[c, crops[n, c, y, x]]

Bytes, per level: 1 read and w written, w = 2 in bf16: the floor, 200 MB at V = 10 (2 x 224, 8 x
96), B = 128, where the five passes of plain torch (to fp32, divide, subtract, divide, to bf16) move
35 a level, 2.3 GB. The table, 1.5 KiB in bf16, stays in L1. Nothing is rounded here: the table
holds what those passes make of the 256 levels.

A program takes a block of pixels, all three channels; all of its loads come before its stores. A
thread takes the pixels of one 16-byte store, 8 in bf16, and its loads are as many bytes: with
16-byte loads the levels would change threads on the way to their stores, through shared memory and
5 barriers. Interleaved pixels, as Pillow has them, and planes that do not lie on multiples of 16
are read byte by byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pixels of a program; 96 x 96 and 224 x 224 are whole blocks


@triton.jit
def _levels(image, channel: tl.constexpr, i, inside, area, INTERLEAVED: tl.constexpr):
    at = 3 * i + channel if INTERLEAVED else channel * area + i
    return tl.load(image + at, inside, 0).to(tl.int32)


@triton.jit
def _normalize(
    crops,  # (N, 3, area), or (N, area, 3) if INTERLEAVED
    norm_lut,  # (3, 256)
    out,  # (N, 3, area) out, in norm_lut's dtype
    area,
    blocks,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: N blocks; blocks = ceil(area / BLOCK)."""
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start = tl.cast(n, tl.int64) * 3 * area
    i = block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < area
    r = _levels(crops + start, 0, i, inside, area, INTERLEAVED)
    g = _levels(crops + start, 1, i, inside, area, INTERLEAVED)
    b = _levels(crops + start, 2, i, inside, area, INTERLEAVED)
    r, g, b = tl.load(norm_lut + r), tl.load(norm_lut + 256 + g), tl.load(norm_lut + 512 + b)
    place = out + start + i
    tl.store(place, r, inside)
    tl.store(place + area, g, inside)
    tl.store(place + 2 * area, b, inside)


def normalize(crops: Tensor, norm_lut: Tensor) -> Tensor:
    """(N, 3, H, W), contiguous, in the dtype of norm_lut (3, 256), from uint8 crops of that shape,
    contiguous or channels_last."""
    N, _, height, width = crops.shape
    area, blocks = height * width, triton.cdiv(height * width, BLOCK)
    out = torch.empty(crops.shape, dtype=norm_lut.dtype, device=crops.device)
    with torch.cuda.device_of(out):
        _normalize[N * blocks,](
            crops,
            norm_lut,
            out,
            area,
            blocks,
            not crops.is_contiguous(),
            BLOCK,
            num_warps=BLOCK * norm_lut.itemsize // 512,
            enable_fp_fusion=False,
        )
    return out
