"""color: what becomes of a crop once it is cut (arXiv 2104.14294, section 3.2), bit for bit as
Pillow computes it.

    mirror
    -> brightness, contrast about the crop's own gray mean, saturation, HSV hue, in the drawn order
    -> gray -> three box blurs along rows and three along columns -> solarize
    -> out = norm_lut[channel, level], normalized

Pillow rounds to 8 bits after every step, so the steps are integers and single fp32 operations:
nothing may be contracted to an fma, divisions are rounded to nearest, and part of the hue is fp64,
as there.

Bytes, per pixel: 3 read and 3 w written, w = 2 in bf16, is the floor: 200 MB at V = 10 (2 x 224, 8
x 96), B = 128. `_means` reads the 3 once more, because contrast needs the mean of the whole crop:
67 MB. Of a blurred crop 3 are written and read again six times, because each pass of a box blur
rounds: 425 MB where half of the pixels are blurred, in L2 as far as it fits. By count 0.2 to 0.3 ms
of an H100's memory time, 1 % of a step at 4,000 images/s: so the kernels are simple, one pass each.

Every per-crop number comes from one table (V B, FIELDS) of int32, of which the fields are named
below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pixels of a program: 4 a thread; sums of a block's levels stay far below 2^31
WARPS = 8
PARTS = 64  # partial sums that are added at a time

FIELDS = 17  # numbers of a crop
ORDER = tl.constexpr(0)  # 0 brightness, 1 contrast, 2 saturation, 3 hue: four, as they are applied
# of each of those, the bits of an fp32; of hue the turn in steps of 256, a whole number
FACTOR = tl.constexpr(4)
CONTRAST = tl.constexpr(8)  # how many operations come before contrast; NONE without jitter
GRAY = tl.constexpr(9)  # 0 or 1
SOLARIZE = tl.constexpr(10)  # 0 or 1
RADIUS = tl.constexpr(11)  # whole pixels of the box on either side; NONE without blur
NEAR = tl.constexpr(12)  # the weight of those, 24 bits
FAR = tl.constexpr(13)  # the weight of the two beyond
SLOT = tl.constexpr(14)  # which of the blurred crops it is
BLURRED = tl.constexpr(15)  # in row i: which crop is number i of the blurred ones
FLIP = tl.constexpr(16)  # 0 or 1
NONE = tl.constexpr(-1)


@triton.jit
def _luma(r, g, b):
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


@triton.jit
def _blend(base, x, factor):
    """base + factor (x - base), cut off below the point."""
    mixed = base.to(tl.float32) + factor * (x - base).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _hue(r, g, b, step):
    """Through 8-bit HSV, in which the hue is turned by `step` of 256."""
    most, least = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    span = (most - least).to(tl.float32)
    divisor, ceiling = tl.maximum(span, 1.0), tl.maximum(most.to(tl.float32), 1.0)
    rc = tl.div_rn((most - r).to(tl.float32), divisor)
    gc = tl.div_rn((most - g).to(tl.float32), divisor)
    bc = tl.div_rn((most - b).to(tl.float32), divisor)
    by_r, by_g = r == most, g == most
    plus = tl.where(by_r, bc, tl.where(by_g, rc, gc)).to(tl.float64)
    minus = tl.where(by_r, gc, tl.where(by_g, bc, rc)).to(tl.float64)
    base = tl.where(by_r, 0.0, tl.where(by_g, 2.0, 4.0)).to(tl.float64)
    turn = (base + plus - minus).to(tl.float32).to(tl.float64) * 0.16666666666666666 + 1.0
    circle = tl.where(turn >= 1.0, turn - 1.0, turn).to(tl.float32)  # turn is in [5/6, 2)
    hue = ((circle.to(tl.float64) * 255.0).to(tl.int32) + step) & 255
    saturation = tl.div_rn(tl.div_rn(span * 255.0, ceiling).to(tl.int32).to(tl.float32), 255.0)
    sixth = hue * 6 // 255
    part = tl.div_rn((hue * 6 - sixth * 255).to(tl.float32), 255.0)
    value = most.to(tl.float32)
    p = (value * (1.0 - saturation) + 0.5).to(tl.int32)
    q = (value * (1.0 - saturation * part) + 0.5).to(tl.int32)
    t = (value * (1.0 - saturation * (1.0 - part)) + 0.5).to(tl.int32)
    k = tl.where(sixth == 6, 0, sixth)
    r = tl.where((k == 0) | (k == 5), most, tl.where(k == 1, q, tl.where(k == 4, t, p)))
    g = tl.where((k == 1) | (k == 2), most, tl.where(k == 0, t, tl.where(k == 3, q, p)))
    b = tl.where((k == 3) | (k == 4), most, tl.where(k == 2, t, tl.where(k == 5, q, p)))
    return r, g, b


@triton.jit
def _jittered(r, g, b, fields, first, last, mean):
    """Operations first .. last - 1 of the crop's order."""
    factors = (fields + FACTOR).to(tl.pointer_type(tl.float32))
    for i in range(first, last):
        operation, factor = tl.load(fields + ORDER + i), tl.load(factors + i)
        if operation == 0:
            r, g, b = _blend(r * 0, r, factor), _blend(g * 0, g, factor), _blend(b * 0, b, factor)
        elif operation == 1:
            middle = r * 0 + mean
            r = _blend(middle, r, factor)
            g = _blend(middle, g, factor)
            b = _blend(middle, b, factor)
        elif operation == 2:
            gray = _luma(r, g, b)
            r, g, b = _blend(gray, r, factor), _blend(gray, g, factor), _blend(gray, b, factor)
        else:
            r, g, b = _hue(r, g, b, factor.to(tl.int32))
    return r, g, b


@triton.jit
def _pixels(crops, n, i, inside, fields, B, side, area):
    """Levels of pixels i of crop n, one of V B, as they are once it is mirrored or not."""
    i = tl.where(tl.load(fields + FLIP) != 0, i + side - 1 - i % side * 2, i)
    start = tl.load(crops + n // B).to(tl.pointer_type(tl.uint8)) + (n % B).to(tl.int64) * 3 * area
    return (
        tl.load(start + 3 * i, inside, 0).to(tl.int32),
        tl.load(start + 3 * i + 1, inside, 0).to(tl.int32),
        tl.load(start + 3 * i + 2, inside, 0).to(tl.int32),
    )


@triton.jit
def _store_normalized(out, norm_lut, n, channel, i, inside, level, solarized, area):
    level = tl.where((level >= 128) & (solarized != 0), 255 - level, level)
    number = tl.load(norm_lut + channel * 256 + level, inside, 0.0)
    tl.store(
        out + (tl.cast(n, tl.int64) * 3 + channel) * area + i,
        number.to(out.dtype.element_ty),
        inside,
    )


@triton.jit(do_not_specialize=("B",))
def _means(
    crops,  # (V,) addresses of crops (B, S, S, 3)
    numbers,  # (V B, FIELDS)
    sums,  # (V B, blocks) out: gray levels of a block of pixels, where there is contrast
    B,
    side,
    area,
    blocks,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: V B blocks; blocks = ceil(area / BLOCK), area = S S."""
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    fields = numbers + n * FIELDS
    before = tl.load(fields + CONTRAST)
    if before != NONE:
        i = block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        r, g, b = _pixels(crops, n, i, i < area, fields, B, side, area)
        r, g, b = _jittered(r, g, b, fields, 0, before, 0)
        tl.store(sums + n * blocks + block, tl.sum(tl.where(i < area, _luma(r, g, b), 0), 0))


@triton.jit(do_not_specialize=("B",))
def _color(
    crops,  # (V,) addresses of crops (B, S, S, 3)
    numbers,  # (V B, FIELDS)
    sums,  # (V B, blocks)
    norm_lut,  # (3, 256): what each level of each channel becomes
    planes,  # (blurred, 3, S, S) out: levels of the crops that are to be blurred
    out,  # (V B, 3, S, S) out: the others
    B,
    side,
    area,
    blocks,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: V B blocks."""
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    fields = numbers + n * FIELDS
    i = block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < area
    r, g, b = _pixels(crops, n, i, inside, fields, B, side, area)
    if tl.load(fields + CONTRAST) != NONE:
        total = tl.zeros((PARTS,), tl.int64)
        for first in range(0, blocks, PARTS):
            part = first + tl.arange(0, PARTS)
            total += tl.load(sums + n * blocks + part, part < blocks, 0)
        # to the nearest
        mean = ((2 * tl.sum(total, 0) + area) // (2 * tl.cast(area, tl.int64))).to(tl.int32)
        r, g, b = _jittered(r, g, b, fields, 0, 4, mean)
    if tl.load(fields + GRAY) != 0:
        r = _luma(r, g, b)
        g, b = r, r
    if tl.load(fields + RADIUS) == NONE:
        solarized = tl.load(fields + SOLARIZE)
        _store_normalized(out, norm_lut, n, 0, i, inside, r, solarized, area)
        _store_normalized(out, norm_lut, n, 1, i, inside, g, solarized, area)
        _store_normalized(out, norm_lut, n, 2, i, inside, b, solarized, area)
    else:
        plane = planes + tl.load(fields + SLOT).to(tl.int64) * 3 * area + i
        tl.store(plane, r.to(tl.uint8), inside)
        tl.store(plane + area, g.to(tl.uint8), inside)
        tl.store(plane + 2 * area, b.to(tl.uint8), inside)


@triton.jit
def _blur(
    numbers,  # (V B, FIELDS)
    norm_lut,  # (3, 256)
    planes,  # (blurred, 3, S, S)
    blurred,  # (blurred, 3, S, S) out, or, of the LAST pass,
    out,  # (V B, 3, S, S) out
    side,
    area,
    blocks,
    ALONG_ROWS: tl.constexpr,
    LAST: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blurred 3 blocks. One pass of a box; the border is repeated."""
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, channel = tl.load(numbers + plane // 3 * FIELDS + BLURRED), plane % 3
    fields = numbers + n * FIELDS
    radius, near, far = tl.load(fields + RADIUS), tl.load(fields + NEAR), tl.load(fields + FAR)
    i = block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = i < area
    start = planes + tl.cast(plane, tl.int64) * area
    at, stride = (i % side, 1) if ALONG_ROWS else (i // side, side)
    first = i - at * stride
    beyond = tl.load(start + first + tl.maximum(at - radius - 1, 0) * stride, inside, 0).to(
        tl.uint32
    )
    beyond += tl.load(start + first + tl.minimum(at + radius + 1, side - 1) * stride, inside, 0)
    total = beyond * far.to(tl.uint32) + (1 << 23)
    for k in range(-radius, radius + 1):
        pixel = first + tl.minimum(tl.maximum(at + k, 0), side - 1) * stride
        total += tl.load(start + pixel, inside, 0).to(tl.uint32) * near.to(tl.uint32)
    level = (total >> 24).to(tl.int32)
    if LAST:
        _store_normalized(
            out, norm_lut, n, channel, i, inside, level, tl.load(fields + SOLARIZE), area
        )
    else:
        tl.store(blurred + tl.cast(plane, tl.int64) * area + i, level.to(tl.uint8), inside)


def color(
    crops: Sequence[Tensor], numbers: Tensor, n_blurred: int, norm_lut: Tensor, dtype: torch.dtype
) -> Tensor:
    """(V B, 3, S, S) in `dtype`, from V contiguous tensors (B, S, S, 3) of uint8.

    On the device: numbers (V B, FIELDS) int32, as named above, of which n_blurred crops are
    blurred; norm_lut (3, 256) fp32.
    """
    (B, side, _, _), V, device = crops[0].shape, len(crops), crops[0].device
    area, blocks = side * side, triton.cdiv(side * side, BLOCK)
    out = torch.empty(V * B, 3, side, side, dtype=dtype, device=device)
    addresses = torch.tensor(
        [c.data_ptr() for c in crops], dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    # from pageable memory the host would wait for the device
    addresses = addresses.to(device, non_blocking=True)
    sums = torch.empty(V * B, blocks, dtype=torch.int32, device=device)
    planes, others = (
        torch.empty(n_blurred, 3, side, side, dtype=torch.uint8, device=device) for _ in range(2)
    )
    options = {"FIELDS": FIELDS, "BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(out):
        _means[V * B * blocks,](addresses, numbers, sums, B, side, area, blocks, **options)
        _color[V * B * blocks,](
            addresses,
            numbers,
            sums,
            norm_lut,
            planes,
            out,
            B,
            side,
            area,
            blocks,
            PARTS=PARTS,
            **options,
        )
        for i in range(6 if n_blurred else 0):
            _blur[n_blurred * 3 * blocks,](
                numbers,
                norm_lut,
                planes,
                others,
                out,
                side,
                area,
                blocks,
                ALONG_ROWS=i < 3,
                LAST=i == 5,
                **options,
            )
            planes, others = others, planes
    return out
