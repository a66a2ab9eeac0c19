"""dino_loss (arXiv 2104.14294, equation 2 with multi-crop) over materialised logits: the loss, and in backward its gradient.

    q[t, b, :] = softmax((teacher[t, b, :] - center) / teacher_temp), or teacher[t, b, :] itself           t = 0 .. T-1, T <= 2
    loss       = 1 / (B pairs) sum_b sum_v [mass_v log sum_k e^(d / student_temp) - <Q_v, d> / student_temp]
                 d = student[v, b, :] - max_k,   Q_v = sum of q[t, b, :] over t != v, or over all t,   mass_v = sum_k Q_v
    grad       = upstream / (B pairs student_temp) (mass_v softmax(student / student_temp) - Q_v)

Both terms of the bracket are positive: nothing cancels, however large the logits.

Bytes, in slabs of B rows of logits: the floor, with all V + T rows of an image kept on chip, is V + 2 read and V written, 22
for V = 10; but those rows are 1.5 MiB at K = 65,536 in bf16, more than a multiprocessor's 228 KiB, and Triton cannot spread
them over a cluster. So there are two passes: forward reads V + 2, backward reads V + 2 again and writes V, 34 for V = 10, with
any upstream, and 12 where no gradient is wanted. The programs that sum the teacher's columns read 2 more; they start first,
and what they read is in L2 for the rest of that pass, as far as it fits. Backward takes the images in reverse, to begin with
what forward has left in L2.

A forward program takes a chunk of columns of all rows of an image: the teacher's weights stay in registers while the student's
rows go by, each chunk relative to its own maximum. A second, small kernel joins the chunks of a row, as flash attention joins
its blocks. A backward program takes a block of columns of all rows and needs two numbers a row. Both load a row ahead, because
a load cannot pass the store of the row before. Scratch, in fp32: 4 numbers per row and chunk until the loss is there; 2 per
row, the temperature and the centre (which move before backward), until the gradient is there. Block sizes are reasoned, not
measured.

No atomics: every sum is taken in an order fixed by the shapes. Sums over a row are fp32, in trees of a chunk and then over the
chunks; the sum over images is fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048             # columns of a forward program: 8 a thread, one 16-byte load of bf16 a row
ROWS, COLUMNS = 8, 512   # tile of a column-sum program: a row a warp
CHUNKS = 32              # chunks that are joined at a time
BLOCK = 2048             # columns of a backward program: 8 a thread, one 16-byte load of bf16 for each of the V + T rows
PARTS = 4096             # numbers that the last kernel adds at a time
WARPS = 8

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _row(x, outer, image, outer_stride, image_stride):
    """Pointer to the row (outer, image) of x; 64-bit offsets."""
    return x + tl.cast(outer, tl.int64) * outer_stride + tl.cast(image, tl.int64) * image_stride


@triton.jit
def _meets(v, t: tl.constexpr, DIAGONAL: tl.constexpr):
    """1.0 where crop v and teacher crop t make a pair."""
    return v * 0.0 + 1.0 if DIAGONAL else tl.where(v != t, 1.0, 0.0)


@triton.jit
def _exponentials(x, factor):
    """Of one chunk: its maximum, d = x - maximum, 2^(d factor). A chunk of -inf weighs nothing; NaN and inf give NaN."""
    top = tl.max(x, 0)
    d = x - tl.where(top == MINUS_INF, 0.0, top)
    return top, d, tl.exp2(d * factor)


# -------------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _sum_columns(teacher, center, teacher_sum, center_kept, column_block, T: tl.constexpr, B, K, outer_stride, image_stride,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr):
    k = column_block * COLUMNS + tl.arange(0, COLUMNS)
    if KEEP:
        tl.store(center_kept + k, tl.load(center + k, k < K, 0.0).to(tl.float32), k < K)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, T * B, ROWS):
        row = first + tl.arange(0, ROWS)
        start = _row(teacher, row // B, row % B, outer_stride, image_stride)
        sums += tl.load(start[:, None] + k[None, :], (row < T * B)[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
    tl.store(teacher_sum + k, tl.sum(sums, 0), k < K)


@triton.jit
def _teacher_chunk(teacher, t: tl.constexpr, center_chunk, factor, b, k, V, K, N, chunk, outer_stride, image_stride, parts,
                   plane, T: tl.constexpr, CENTERED: tl.constexpr):
    """Weights (CHUNK,) of teacher crop t, relative to their maximum; what belongs to the chunk goes into parts."""
    start = _row(teacher, t, b, outer_stride, image_stride)
    if CENTERED:
        x = tl.load(start + k, k < K, MINUS_INF).to(tl.float32) - center_chunk
        top, d, weight = _exponentials(x, factor)
        moment = tl.sum(weight * tl.where(d == MINUS_INF, 0.0, d), 0)                     # a logit of -inf has no weight
    else:
        weight = tl.load(start + k, k < K, 0.0).to(tl.float32)
        top, moment = 0.0, 0.0
    at = parts + (b * (V + T) + V + t) * N + chunk
    tl.store(at, top)
    tl.store(at + plane, tl.sum(weight, 0))
    tl.store(at + 2 * plane, moment)
    return weight


@triton.jit(do_not_specialize=("V", "B", "N", "column_programs"), do_not_specialize_on_alignment=("teacher_temp",))
def _statistics(
    student,         # (V, B, K)
    teacher,         # (T, B, K)
    center,          # (K,), CENTERED only
    teacher_temp,    # (), CENTERED only
    teacher_sum,     # (K,) out, CENTERED only: sum over the T B rows
    center_kept,     # (K,) out, KEEP only
    parts,           # (4, B, V + T, N) out, of each chunk of the student's V rows and then the teacher's T: maximum; sum of
    #                  2^((x - maximum) factor), or of the probabilities; the same with each term times (x - maximum) for a
    #                  teacher's row, and for a student's with the weights of teacher crop 0; of teacher crop 1
    student_inv_temp, V, B, K, N, student_outer_stride, student_image_stride, teacher_outer_stride, teacher_image_stride,
    column_programs, T: tl.constexpr, CENTERED: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: column_programs + B N; N chunks a row."""
    program = tl.program_id(0)
    if program < column_programs:
        _sum_columns(teacher, center, teacher_sum, center_kept, program, T, B, K, teacher_outer_stride, teacher_image_stride,
                     ROWS, COLUMNS, KEEP)
    else:
        b, chunk = (program - column_programs) // N, (program - column_programs) % N
        plane = tl.cast(B, tl.int64) * (V + T) * N
        k = chunk * CHUNK + tl.arange(0, CHUNK)                                                # (CHUNK,)
        c = tl.load(center + k, k < K, 0.0).to(tl.float32) if CENTERED else 0.0
        teacher_factor = LOG2E / tl.load(teacher_temp).to(tl.float32) if CENTERED else 0.0
        weight0 = _teacher_chunk(teacher, 0, c, teacher_factor, b, k, V, K, N, chunk, teacher_outer_stride,
                                 teacher_image_stride, parts, plane, T, CENTERED)
        if T == 2:
            weight1 = _teacher_chunk(teacher, 1, c, teacher_factor, b, k, V, K, N, chunk, teacher_outer_stride,
                                     teacher_image_stride, parts, plane, T, CENTERED)
        ahead = tl.load(_row(student, 0, b, student_outer_stride, student_image_stride) + k, k < K, MINUS_INF)
        for v in range(V):
            x = ahead.to(tl.float32)
            ahead = tl.load(_row(student, v + 1, b, student_outer_stride, student_image_stride) + k, (k < K) & (v + 1 < V),
                            MINUS_INF)
            top, d, weight = _exponentials(x, LOG2E * student_inv_temp)
            d = tl.where(k < K, d, 0.0)
            at = parts + (b * (V + T) + v) * N + chunk
            tl.store(at, top)
            tl.store(at + plane, tl.sum(weight, 0))
            tl.store(at + 2 * plane, tl.sum(weight0 * d, 0))
            if T == 2:
                tl.store(at + 3 * plane, tl.sum(weight1 * d, 0))


@triton.jit
def _whole_teacher_row(parts, plane, row, N, factor, CHUNKS: tl.constexpr):
    """Maximum and sum of one row from its chunks."""
    top = MINUS_INF
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        top = tl.maximum(top, tl.max(tl.load(parts + row * N + chunk, chunk < N, MINUS_INF), 0))
    total = 0.0
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        below = tl.load(parts + row * N + chunk, chunk < N, MINUS_INF) - top    # a row of -inf gives NaN here and from here on
        total += tl.sum(tl.exp2(below * factor) * tl.load(parts + plane + row * N + chunk, chunk < N, 0.0), 0)
    return top, total


@triton.jit
def _joined_dots(parts, plane, t: tl.constexpr, teacher_top, teacher_row, dots, below, chunk, N, factor):
    """Part (ROWS,) of <teacher weights, student - maximum> in these chunks; weights relative to the teacher row's maximum."""
    at = parts + teacher_row * N + chunk                                                       # (CHUNKS,)
    weight = tl.exp2((tl.load(at, chunk < N, MINUS_INF) - teacher_top) * factor)
    total = tl.load(at + plane, chunk < N, 0.0)
    return tl.sum(weight[None, :] * (dots + tl.where(chunk < N, below, 0.0) * total[None, :]), 1)


@triton.jit(do_not_specialize=("V", "B", "N"), do_not_specialize_on_alignment=("teacher_temp", "temp_kept"))
def _join(
    parts,           # (4, B, V + T, N)
    teacher_temp,    # (), CENTERED only
    saved,           # (B, V + T, 2) out, KEEP only: maximum and 1 / sum of each row; of a row of probabilities 0 and its sum
    temp_kept,       # () out, KEEP only; zeros fill the place up to 16 bytes
    losses,          # (B,) out: sum over the crops of an image
    entropies,       # (B,) out: sum over the teacher's rows
    student_inv_temp, V, B, N, T: tl.constexpr, CENTERED: tl.constexpr, DIAGONAL: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):
    """Grid: B. ROWS is V, or the next power of 2."""
    b = tl.program_id(0)
    plane = tl.cast(B, tl.int64) * (V + T) * N
    v = tl.arange(0, ROWS)                                                                     # (ROWS,)
    first_row = tl.cast(b, tl.int64) * (V + T)
    rows = parts + (first_row + v[:, None]) * N                                                # (ROWS, 1)
    factor = LOG2E * student_inv_temp
    temp = tl.load(teacher_temp).to(tl.float32) if CENTERED else 1.0
    teacher_factor = LOG2E / temp if CENTERED else 1.0          # the maximum of probabilities is kept as 0
    top0, total0 = _whole_teacher_row(parts, plane, first_row + V, N, teacher_factor, CHUNKS)
    top1, total1 = top0, total0
    if T == 2:
        top1, total1 = _whole_teacher_row(parts, plane, first_row + V + 1, N, teacher_factor, CHUNKS)

    top = tl.full((ROWS,), MINUS_INF, tl.float32)
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)                                                   # (CHUNKS,)
        top = tl.maximum(top, tl.max(tl.load(rows + chunk, (v < V)[:, None] & (chunk < N), MINUS_INF), 1))
    total, dot0, dot1 = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    moment0, moment1 = 0.0, 0.0
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (v < V)[:, None] & (chunk < N)                                                # (ROWS, CHUNKS)
        below = tl.load(rows + chunk, inside, MINUS_INF) - top[:, None]
        total += tl.sum(tl.exp2(below * factor) * tl.load(rows + plane + chunk, inside, 0.0), 1)
        dot0 += _joined_dots(parts, plane, 0, top0, first_row + V, tl.load(rows + 2 * plane + chunk, inside, 0.0), below, chunk,
                             N, teacher_factor)
        if CENTERED:
            moment0 += _moment(parts, plane, first_row + V, top0, chunk, N, teacher_factor)
        if T == 2:
            dot1 += _joined_dots(parts, plane, 1, top1, first_row + V + 1, tl.load(rows + 3 * plane + chunk, inside, 0.0),
                                 below, chunk, N, teacher_factor)
            if CENTERED:
                moment1 += _moment(parts, plane, first_row + V + 1, top1, chunk, N, teacher_factor)

    mass0, scale0 = (1.0, 1.0 / total0) if CENTERED else (total0, 1.0)
    mass1, scale1 = (1.0, 1.0 / total1) if CENTERED else (total1, 1.0)
    meets0 = _meets(v, 0, DIAGONAL)
    mass, dot = meets0 * mass0, meets0 * scale0 * dot0
    if T == 2:
        meets1 = _meets(v, 1, DIAGONAL)
        mass, dot = mass + meets1 * mass1, dot + meets1 * scale1 * dot1
    bracket = tl.where(mass == 0, 0.0, mass * tl.log(total) - dot * student_inv_temp)          # a crop may be in no pair
    tl.store(losses + b, tl.sum(tl.where(v < V, bracket, 0.0), 0))
    entropy = tl.log(total0) - moment0 / (total0 * temp)
    if T == 2:
        entropy += tl.log(total1) - moment1 / (total1 * temp)
    tl.store(entropies + b, entropy)
    if KEEP:
        at = saved + 2 * (first_row + v)
        tl.store(at, top, v < V)
        tl.store(at + 1, 1.0 / total, v < V)
        at = saved + 2 * (first_row + V)
        tl.store(at, top0)
        tl.store(at + 1, scale0 if CENTERED else total0)
        if T == 2:
            tl.store(at + 2, top1)
            tl.store(at + 3, scale1 if CENTERED else total1)
        if b == 0:
            i = tl.arange(0, 4)
            tl.store(temp_kept + i, tl.where(i == 0, temp, 0.0), i < 4 - 2 * B * (V + T) % 4)      # up to the centre


@triton.jit
def _moment(parts, plane, row, top, chunk, N, factor):
    """Part of sum (x - maximum) 2^((x - maximum) factor) of a teacher row in these chunks."""
    at = parts + row * N + chunk
    below = tl.load(at, chunk < N, MINUS_INF) - top
    shift = tl.where(below == MINUS_INF, 0.0, below) * tl.load(at + plane, chunk < N, 0.0)
    return tl.sum(tl.exp2(below * factor) * (tl.load(at + 2 * plane, chunk < N, 0.0) + shift), 0)


@triton.jit
def _sum_parts(parts, n, PARTS: tl.constexpr):
    sums = tl.zeros((PARTS,), tl.float64)
    for first in range(0, n, PARTS):
        i = first + tl.arange(0, PARTS)
        sums += tl.load(parts + i, i < n, 0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=("B",))
def _finish(
    losses,          # (B,)
    entropies,       # (B,)
    loss,            # () out
    entropy,         # () out
    inv_pairs, B, T: tl.constexpr, PARTS: tl.constexpr,
):
    """Grid: 1."""
    tl.store(loss, (_sum_parts(losses, B, PARTS) * inv_pairs / tl.cast(B, tl.float64)).to(tl.float32))
    tl.store(entropy, (_sum_parts(entropies, B, PARTS) / (tl.cast(B, tl.float64) * T)).to(tl.float32))


def saved_numbers(B: int, rows: int, K: int) -> int:
    """How many numbers are kept for backward: 2 for each of the V + T rows of B images, the temperature, and a centre (K,),
    which begins on a multiple of 16 bytes; K is 0 without one."""
    return (2 * B * rows + 4) // 4 * 4 + K


def _parts_of(saved: Tensor, B: int, rows: int) -> tuple[Tensor, Tensor]:
    """The temperature () and the centre (K,) in what is kept for backward."""
    return saved[2 * B * rows:], saved[saved_numbers(B, rows, 0):]


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor | None, student_temp: float, teacher_temp: Tensor, pairs: int,
              diagonal: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), mean teacher entropy (), teacher_sum (K,) and what `dino_loss_backward` needs, all fp32.

    student (V, B, K), teacher (T, B, K) with T of 1 or 2, center (K,): float32, bfloat16 or float16 on one device, the last
    axis contiguous; without a centre the teacher's rows are probabilities, entropy means nothing and teacher_sum is empty.
    teacher_temp, one number in any float dtype, likewise on the device: the host never looks at it.
    """
    (V, B, K), T, centered = student.shape, len(teacher), center is not None
    N = triton.cdiv(K, CHUNK)
    column_programs = triton.cdiv(K, COLUMNS) if centered else 0

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)
    loss, entropy, teacher_sum = numbers(), numbers(), numbers(K if centered else 0)
    saved = numbers(saved_numbers(B, V + T, K if centered else 0) if with_grad else 0)
    temp_kept, center_kept = _parts_of(saved, B, V + T)
    parts, losses, entropies = numbers(4, B, V + T, N), numbers(B), numbers(B)
    center = center.contiguous() if centered else teacher_temp
    with torch.cuda.device_of(student):
        _statistics[column_programs + B * N,](
            student, teacher, center, teacher_temp, teacher_sum, center_kept, parts, 1 / student_temp, V, B, K, N,
            *student.stride()[:2], *teacher.stride()[:2], column_programs, T, centered, centered and with_grad, CHUNK, ROWS,
            COLUMNS, num_warps=WARPS)
        _join[B,](parts, teacher_temp, saved, temp_kept, losses, entropies, 1 / student_temp, V, B, N, T, centered, diagonal,
                  with_grad, triton.next_power_of_2(V), CHUNKS, num_warps=WARPS)
        _finish[1,](losses, entropies, loss, entropy, 1 / pairs, B, T, PARTS, num_warps=WARPS)
    return loss, entropy, teacher_sum, saved


# ------------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _teacher_tile(teacher, t: tl.constexpr, center_tile, factor, saved, b, k, V, K, outer_stride, image_stride,
                  T: tl.constexpr, CENTERED: tl.constexpr):
    """q[t, b, k] (BLOCK,) and the mass of the whole row."""
    at = saved + 2 * (tl.cast(b, tl.int64) * (V + T) + V + t)
    x = tl.load(_row(teacher, t, b, outer_stride, image_stride) + k, k < K, 0.0).to(tl.float32)
    if CENTERED:
        q, mass = tl.exp2((x - center_tile - tl.load(at)) * factor) * tl.load(at + 1), 1.0
    else:
        q, mass = x, tl.load(at + 1)
    return q, mass


@triton.jit(do_not_specialize=("V", "B"), do_not_specialize_on_alignment=("temp_kept", "upstream"))
def _gradient(
    upstream,        # ()
    student,         # (V, B, K)
    teacher,         # (T, B, K)
    saved,           # (B, V + T, 2)
    center_kept,     # (K,), CENTERED only
    temp_kept,       # (), CENTERED only
    grad,            # (V, B, K) out, contiguous
    student_inv_temp, grad_scale, V, B, K, student_outer_stride, student_image_stride, teacher_outer_stride,
    teacher_image_stride, T: tl.constexpr, CENTERED: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid: B blocks; blocks = ceil(K / BLOCK)."""
    blocks = tl.cdiv(K, BLOCK)
    b, block = B - 1 - tl.program_id(0) // blocks, tl.program_id(0) % blocks
    k = block * BLOCK + tl.arange(0, BLOCK)                                                    # (BLOCK,)
    c = tl.load(center_kept + k, k < K, 0.0) if CENTERED else 0.0
    teacher_factor = LOG2E / tl.load(temp_kept) if CENTERED else 0.0
    scale = tl.load(upstream).to(tl.float32) * grad_scale
    q0, mass0 = _teacher_tile(teacher, 0, c, teacher_factor, saved, b, k, V, K, teacher_outer_stride, teacher_image_stride, T,
                              CENTERED)
    if T == 2:
        q1, mass1 = _teacher_tile(teacher, 1, c, teacher_factor, saved, b, k, V, K, teacher_outer_stride, teacher_image_stride,
                                  T, CENTERED)
    factor = LOG2E * student_inv_temp
    at = saved + 2 * tl.cast(b, tl.int64) * (V + T)
    ahead = tl.load(_row(student, 0, b, student_outer_stride, student_image_stride) + k, k < K, 0.0)
    for v in range(V):
        s = ahead.to(tl.float32)
        ahead = tl.load(_row(student, v + 1, b, student_outer_stride, student_image_stride) + k, (k < K) & (v + 1 < V), 0.0)
        meets = _meets(v, 0, DIAGONAL)
        target, mass = meets * q0, meets * mass0
        if T == 2:
            meets = _meets(v, 1, DIAGONAL)
            target, mass = target + meets * q1, mass + meets * mass1
        own = scale * mass * tl.load(at + 2 * v + 1)
        g = own * tl.exp2((s - tl.load(at + 2 * v)) * factor) - scale * target
        tl.store(_row(grad, v, b, tl.cast(B, tl.int64) * K, K) + k, g.to(grad.dtype.element_ty), k < K)


def dino_loss_backward(upstream: Tensor, student: Tensor, teacher: Tensor, saved: Tensor, student_temp: float, centered: bool,
                       pairs: int, diagonal: bool) -> Tensor:
    """The gradient (V, B, K) in student's dtype; upstream () in any float dtype on the device, the rest as in `dino_loss`."""
    (V, B, K), T = student.shape, len(teacher)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    temp_kept, center_kept = _parts_of(saved, B, V + T)
    with torch.cuda.device_of(student):
        _gradient[B * triton.cdiv(K, BLOCK),](
            upstream, student, teacher, saved, center_kept, temp_kept, grad, 1 / student_temp,
            1 / (B * pairs * student_temp), V, B, K, *student.stride()[:2], *teacher.stride()[:2], T, centered, diagonal, BLOCK,
            num_warps=WARPS)
    return grad
