"""dino_loss (arXiv 2104.14294, equation 2 with multi-crop) over materialised logits, with the gradient for an upstream of 1.

    q[t, b, :] = softmax((teacher[t, b, :] - center) / teacher_temp)                                      t = 0, 1
    loss       = 1 / (B P) sum_b sum_v [n_v log sum_k e^(d / student_temp) - <Q_v, d> / student_temp],   P = 2 (V - 1)
                 d = student[v, b, :] - max_k,   Q_v = sum of q[t, b, :] over t != v,   n_v = the number of such t
    grad       = grad_scale (n_v softmax(student / student_temp) - Q_v)

Both terms of the bracket are positive: nothing cancels, however large the logits.

Bytes, in slabs of B rows of logits: the floor, with all V + 2 rows of an image kept on chip, is V + 2 read and V written, 22
for V = 10; but those rows are 1.5 MiB at K = 65,536 in bf16, more than a multiprocessor's 228 KiB, and Triton cannot spread
them over a cluster. So there are two passes, statistics and then gradient: V + 2 read, V + 2 read again, V written, 34 for
V = 10. The programs that sum the teacher's columns read 2 more; they start first, and what they read is in L2 for the rest of
that pass, as far as it fits. The gradient pass takes the images in reverse, to begin with what the first pass has left in L2.

A statistics program takes a chunk of a row: a whole row would save the partial sums, but at B = 8 leaves a quarter of 132
multiprocessors idle, and would need a running maximum. A gradient program takes a block of columns of all rows of an image, so
that it forms q once; it loads a row ahead, because a load cannot pass the store of the row before. Scratch, in fp32:
2 (V + 2) + 2 numbers per image and chunk, one per image and block. Block sizes are reasoned, not measured.

No atomics: every sum is taken in an order fixed by the shapes. Sums over a row are fp32, in trees of a chunk and then over the
chunks; the sum over blocks and images is fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192             # columns of a statistics program: 32 a thread, four 16-byte loads in flight of bf16
ROWS, COLUMNS = 8, 512   # tile of a column-sum program: a row a warp
BLOCK = 2048             # columns of a gradient program: 8 a thread, one 16-byte load of bf16 for each of the V + 2 rows
PARTS = 4096             # numbers that the last kernel adds at a time
WARPS = 8

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _row(x, outer, image, outer_stride, image_stride):
    """Pointer to the row (outer, image) of x; 64-bit offsets."""
    return x + tl.cast(outer, tl.int64) * outer_stride + tl.cast(image, tl.int64) * image_stride


@triton.jit
def _exponentials(x, factor):
    """Of one chunk: its maximum, d = x - maximum, 2^(d factor). A chunk of -inf weighs nothing; NaN and inf give NaN."""
    top = tl.max(x, 0)
    d = x - tl.where(top == MINUS_INF, 0.0, top)
    return top, d, tl.exp2(d * factor)


@triton.jit
def _sum_columns(teacher, teacher_sum, column_block, B, K, outer_stride, image_stride, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):
    k = column_block * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, 2 * B, ROWS):
        row = first + tl.arange(0, ROWS)
        start = _row(teacher, row // B, row % B, outer_stride, image_stride)
        sums += tl.load(start[:, None] + k[None, :], (row < 2 * B)[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
    tl.store(teacher_sum + k, tl.sum(sums, 0), k < K)


@triton.jit(do_not_specialize=("V", "B", "N", "column_programs"))
def _statistics(
    student,         # (V, B, K)
    teacher,         # (2, B, K)
    center,          # (K,)
    teacher_temp,    # ()
    teacher_sum,     # (K,) out: sum over the 2 B rows
    tops,            # (B, V + 2, N) out: maximum of each chunk, the student's V rows and then the teacher's 2 less the centre
    sums,            # (B, V + 2, N) out: sum of e^((x - maximum) / temperature) over each chunk
    moments,         # (B, 2, N) out: the same sum with each term times (x - maximum), teacher only
    student_inv_temp, V, B, K, N, student_outer_stride, student_image_stride, teacher_outer_stride, teacher_image_stride,
    column_programs, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Grid: column_programs + B (V + 2) N; N chunks a row."""
    program = tl.program_id(0)
    if program < column_programs:
        _sum_columns(teacher, teacher_sum, program, B, K, teacher_outer_stride, teacher_image_stride, ROWS, COLUMNS)
    else:
        at = program - column_programs                                                         # in (B, V + 2, N)
        image, row, chunk = at // N // (V + 2), at // N % (V + 2), at % N
        k = chunk * CHUNK + tl.arange(0, CHUNK)                                                # (CHUNK,)
        if row < V:
            x = tl.load(_row(student, row, image, student_outer_stride, student_image_stride) + k, k < K, MINUS_INF)
            top, d, weight = _exponentials(x.to(tl.float32), LOG2E * student_inv_temp)
        else:
            x = tl.load(_row(teacher, row - V, image, teacher_outer_stride, teacher_image_stride) + k, k < K, MINUS_INF)
            c = tl.load(center + k, k < K, 0.0).to(tl.float32)
            top, d, weight = _exponentials(x.to(tl.float32) - c, LOG2E / tl.load(teacher_temp).to(tl.float32))
            moment = tl.sum(weight * tl.where(d == MINUS_INF, 0.0, d), 0)                      # a logit of -inf has no weight
            tl.store(moments + (image * 2 + row - V) * N + chunk, moment)
        tl.store(tops + at, top)
        tl.store(sums + at, tl.sum(weight, 0))


@triton.jit
def _whole_row(tops, sums, row, N, factor, CHUNKS: tl.constexpr):
    """From the chunks of one row: its maximum, its sum, and each chunk's weight and distance from the maximum (CHUNKS,)."""
    chunk = tl.arange(0, CHUNKS)
    top = tl.load(tops + row * N + chunk, chunk < N, MINUS_INF)
    highest = tl.max(top, 0)
    below = top - highest                                            # a row of -inf gives NaN here and from here on
    weight = tl.exp2(below * factor)
    return highest, tl.sum(weight * tl.load(sums + row * N + chunk, chunk < N, 0.0), 0), weight, below


@triton.jit
def _teacher_tile(teacher, t, center_tile, tops, sums, moments, b, k, V, K, N, outer_stride, image_stride, temp,
                  CHUNKS: tl.constexpr):
    """q[t, b, k] (BLOCK,) and the entropy of the whole row."""
    factor = LOG2E / temp
    row, chunk = b * (V + 2) + V + t, tl.arange(0, CHUNKS)
    top, total, weight, below = _whole_row(tops, sums, row, N, factor, CHUNKS)
    moment = tl.load(moments + (b * 2 + t) * N + chunk, chunk < N, 0.0)
    moment += tl.load(sums + row * N + chunk, chunk < N, 0.0) * tl.where(below == MINUS_INF, 0.0, below)
    x = tl.load(_row(teacher, t, b, outer_stride, image_stride) + k, k < K, MINUS_INF).to(tl.float32)
    q = tl.exp2((x - center_tile - top) * factor) * (1 / total)
    return q, tl.log(total) - tl.sum(weight * moment, 0) / (total * temp)


@triton.jit(do_not_specialize=("V", "B", "N"))
def _gradient(
    student,         # (V, B, K)
    teacher,         # (2, B, K)
    center,          # (K,)
    teacher_temp,    # ()
    tops,            # (B, V + 2, N)
    sums,            # (B, V + 2, N)
    moments,         # (B, 2, N)
    losses,          # (B, blocks) out: of one image and block of columns
    entropies,       # (B,) out: sum over the two teacher rows
    grad,            # (V, B, K) out, contiguous; not touched unless WITH_GRAD
    student_inv_temp, grad_scale, V, B, K, N, student_outer_stride, student_image_stride, teacher_outer_stride,
    teacher_image_stride, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, WITH_GRAD: tl.constexpr,
):
    """Grid: B blocks; blocks = ceil(K / BLOCK); CHUNKS is N, or the next power of 2."""
    blocks = tl.cdiv(K, BLOCK)
    b, block = B - 1 - tl.program_id(0) // blocks, tl.program_id(0) % blocks
    k = block * BLOCK + tl.arange(0, BLOCK)                                                    # (BLOCK,)
    c = tl.load(center + k, k < K, 0.0).to(tl.float32)
    temp = tl.load(teacher_temp).to(tl.float32)
    q0, entropy0 = _teacher_tile(teacher, 0, c, tops, sums, moments, b, k, V, K, N, teacher_outer_stride,
                                 teacher_image_stride, temp, CHUNKS)
    q1, entropy1 = _teacher_tile(teacher, 1, c, tops, sums, moments, b, k, V, K, N, teacher_outer_stride,
                                 teacher_image_stride, temp, CHUNKS)
    factor = LOG2E * student_inv_temp
    logs = 0.0
    dots = tl.zeros((BLOCK,), tl.float32)
    ahead = tl.load(_row(student, 0, b, student_outer_stride, student_image_stride) + k, k < K, 0.0)
    for v in range(V):
        with0, with1 = tl.cast(v != 0, tl.float32), tl.cast(v != 1, tl.float32)
        s = ahead.to(tl.float32)
        ahead = tl.load(_row(student, v + 1, b, student_outer_stride, student_image_stride) + k, (k < K) & (v + 1 < V), 0.0)
        top, total, _, _ = _whole_row(tops, sums, b * (V + 2) + v, N, factor, CHUNKS)
        target = with0 * q0 + with1 * q1                                                       # Q_v
        d = s - top
        dots -= target * d
        logs += (with0 + with1) * tl.log(total)
        if WITH_GRAD:
            own = grad_scale * (with0 + with1) / total
            g = own * tl.exp2(d * factor) - grad_scale * target
            tl.store(_row(grad, v, b, tl.cast(B, tl.int64) * K, K) + k, g.to(grad.dtype.element_ty), k < K)
    loss = tl.sum(dots, 0) * student_inv_temp
    if block == 0:                                                   # what belongs to whole rows is counted once
        loss += logs
        tl.store(entropies + b, entropy0 + entropy1)
    tl.store(losses + b * blocks + block, loss)


@triton.jit
def _sum_parts(parts, n, PARTS: tl.constexpr):
    sums = tl.zeros((PARTS,), tl.float64)
    for first in range(0, n, PARTS):
        i = first + tl.arange(0, PARTS)
        sums += tl.load(parts + i, i < n, 0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=("V", "B", "n_losses"))
def _finish(
    losses,          # (n_losses,)
    entropies,       # (B,)
    loss,            # () out
    entropy,         # () out
    V, B, n_losses, PARTS: tl.constexpr,
):
    """Grid: 1."""
    teacher_rows = tl.cast(B, tl.float64) * 2
    tl.store(loss, (_sum_parts(losses, n_losses, PARTS) / (teacher_rows * (V - 1))).to(tl.float32))
    tl.store(entropy, (_sum_parts(entropies, B, PARTS) / teacher_rows).to(tl.float32))


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: Tensor,
              with_grad: bool, grad_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), mean teacher entropy (), teacher_sum (K,), all fp32, and the gradient (V, B, K) in student's dtype or (0,).

    student (V, B, K), teacher (2, B, K), center (K,): float32, bfloat16 or float16 on one device, the last axis contiguous;
    teacher_temp, one number in any float dtype, likewise: the host never looks at it.
    """
    V, B, K = student.shape
    N, blocks, column_programs = triton.cdiv(K, CHUNK), triton.cdiv(K, BLOCK), triton.cdiv(K, COLUMNS)

    def stat(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)
    loss, entropy, teacher_sum = stat(), stat(), stat(K)
    grad = torch.empty(student.shape if with_grad else 0, dtype=student.dtype, device=student.device)
    tops, sums, moments, losses, entropies = stat(B, V + 2, N), stat(B, V + 2, N), stat(B, 2, N), stat(B, blocks), stat(B)
    strides = (*student.stride()[:2], *teacher.stride()[:2])
    with torch.cuda.device_of(student):
        _statistics[column_programs + B * (V + 2) * N,](
            student, teacher, center, teacher_temp, teacher_sum, tops, sums, moments, 1 / student_temp, V, B, K, N, *strides,
            column_programs, CHUNK, ROWS, COLUMNS, num_warps=WARPS)
        _gradient[B * blocks,](
            student, teacher, center, teacher_temp, tops, sums, moments, losses, entropies, grad, 1 / student_temp, grad_scale,
            V, B, K, N, *strides, triton.next_power_of_2(N), BLOCK, with_grad, num_warps=WARPS)
        _finish[1,](losses, entropies, loss, entropy, V, B, B * blocks, PARTS, num_warps=WARPS)
    return loss, entropy, teacher_sum, grad
