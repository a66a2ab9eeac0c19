"""dino_loss (arXiv 2104.14294, equation 2 with multi-crop) over materialized logits; its gradient:
dino_loss_backward.py.

    q[t, b, :] = softmax((teacher[t, b, :] - center) / teacher_temp), or teacher[t, b, :] itself
    d          = (student[v, b, :] - max_k) / student_temp
    Q_v        = sum of q[t, b, :] over t != v, or over all t;    mass_v = sum_k Q_v;    T <= 2
    loss = 1 / (B pairs) sum_b sum_v [mass_v log sum_k e^d - <Q_v, d>]

Both terms of the bracket are positive: nothing cancels, however large the logits.

Bytes, in slabs of B rows of logits: the floor, with all V + T rows of an image kept on chip, is V +
2 read and V written, 22 for V = 10; but those rows are 1.5 MiB at K = 65,536 in bf16, more than a
multiprocessor's 228 KiB, and Triton cannot spread them over a cluster. So there are two passes:
forward reads V + 2, backward reads V + 2 again and writes V, 34 for V = 10, with any upstream, and
12 where no gradient is wanted. The teacher's columns are summed first, by a kernel of its own,
which reads 2 slabs; they are then in L2 for the pass over the rows, as far as they fit. Scratch, in
fp32: 16 bytes per row and chunk of 512 columns until the loss is there, 1.5 MiB beside 96 MiB of
logits at V = 10, B = 64, K = 65,536 in bf16; 2 numbers per row, the temperature and the center
(which move before backward), until the gradient is there.

A forward program is one warp with a chunk of columns of all rows of an image: the teacher's weights
stay in registers while the student's rows go by, each chunk relative to its own maximum. A sum over
the chunk is then one over a warp, without a barrier: 14 instructions an element in bf16, half of
them the formula's, and 32 warps on a multiprocessor (tests/ops/budgets.py); 256 threads with 2,048
columns took 27, and 12 barriers a row. A second, small kernel joins the chunks of a row, a warp
each, as flash attention joins its blocks. A row is loaded ahead, because a load cannot pass the
store of the row before: 32 KiB are on their way to a multiprocessor, where 3 TB/s take some 23 KiB
a microsecond. Block sizes are reasoned and counted, not measured.

No atomics: every sum is taken in an order fixed by the shapes. Sums over a row are fp32, in trees
of a chunk and then over the chunks; the sum over crops and images is fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 512  # columns of a forward program, one warp: 16 a thread, two 16-byte loads of bf16 a row
# tile of a column-sum program: 8 KiB of bf16, of which three are on their way
ROWS, COLUMNS = 16, 256
CHUNKS = 128  # chunks of a row that its warp joins at a time
PARTS = 1024  # numbers that the last kernel adds at a time
# a product and a sum in one: Triton 3.10 will not do so unasked
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
ONE_WARP = OPTIONS | {"num_warps": 1}

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _row(x, outer, image, outer_stride, image_stride):
    """Pointer to the row (outer, image) of x; 64-bit offsets."""
    return x + tl.cast(outer, tl.int64) * outer_stride + tl.cast(image, tl.int64) * image_stride


@triton.jit
def _mask(condition):
    """A comparison of scalars as part of a mask: no instruction, but without it Triton 3.9's
    interpreter sees a number."""
    return tl.where(condition, True, False)


@triton.jit
def _meets(v, t: tl.constexpr, DIAGONAL: tl.constexpr):
    """1.0 where crop v and teacher crop t make a pair."""
    return v * 0.0 + 1.0 if DIAGONAL else tl.where(v != t, 1.0, 0.0)


@triton.jit
def _exponentials(x, factor):
    """Of one chunk: its maximum, d = x - maximum, 2^(d factor). A chunk of -inf weighs nothing; NaN
    and inf give NaN."""
    top = tl.max(x, 0)
    d = x - tl.where(top == MINUS_INF, 0.0, top)
    return top, d, tl.exp2(d * factor)


# ---- forward
@triton.jit(do_not_specialize=("B",))
def _sum_columns(
    teacher,  # (T, B, K)
    center,  # (K,)
    teacher_sum,  # (K,) out: sum over the T B rows
    center_kept,  # (K,) out, KEEP only
    B,
    K,
    outer_stride,
    image_stride,
    T: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: ceil(K / COLUMNS)."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if KEEP:
        tl.store(center_kept + k, tl.load(center + k, k < K, 0.0).to(tl.float32), k < K)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, T * B, ROWS, num_stages=4):
        row = first + tl.arange(0, ROWS)
        t = tl.where(row < B, 0, 1)  # T is 1 or 2
        start = _row(teacher, t, row - t * B, outer_stride, image_stride)
        sums += tl.load(
            start[:, None] + k[None, :], (row < T * B)[:, None] & (k < K)[None, :], 0.0
        ).to(tl.float32)
    tl.store(teacher_sum + k, tl.sum(sums, 0), k < K)


@triton.jit
def _teacher_chunk(start, center_chunk, factor, k, inside, CENTERED: tl.constexpr):
    """Of a row: weights (CHUNK,) relative to their maximum, the maximum, the sum, the moment about
    the maximum."""
    if CENTERED:
        x = tl.load(start + k, inside, MINUS_INF).to(tl.float32) - center_chunk
        top, d, weight = _exponentials(x, factor)
        # a logit of -inf has no weight
        moment = tl.sum(weight * tl.where(d == MINUS_INF, 0.0, d), 0)
    else:
        weight = tl.load(start + k, inside, 0.0).to(tl.float32)
        top, moment = 0.0, 0.0
    return weight, top, tl.sum(weight, 0), moment


@triton.jit
def _store_parts(at, plane, top, total, moment):
    tl.store(at, top)
    tl.store(at + plane, total)
    tl.store(at + 2 * plane, moment)


@triton.jit(do_not_specialize=("V", "B", "N"), do_not_specialize_on_alignment=("teacher_temp",))
def _statistics(
    student,  # (V, B, K)
    teacher,  # (T, B, K)
    center,  # (K,), CENTERED only
    teacher_temp,  # (), CENTERED only
    parts,  # (4, B, V + T, N) out, of each chunk of the student's V rows, then of the teacher's T
    student_inv_temp,
    V,
    B,
    K,
    N,
    student_outer_stride,
    student_image_stride,
    teacher_outer_stride,
    teacher_image_stride,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: B N; N chunks a row, all of them WHOLE or not.

    parts: maximum; sum of 2^((x - maximum) factor), or of the probabilities; the same with each
    term times (x - maximum) for a teacher's row, and for a student's with the weights of teacher
    crop 0; of teacher crop 1.
    """
    b, chunk = tl.program_id(0) // N, tl.program_id(0) % N
    plane = tl.cast(B, tl.int64) * (V + T) * N
    k = chunk * CHUNK + tl.arange(0, CHUNK)  # (CHUNK,)
    inside = tl.full((CHUNK,), True, tl.int1) if WHOLE else k < K
    c = tl.load(center + k, inside, 0.0).to(tl.float32) if CENTERED else 0.0
    teacher_factor = LOG2E / tl.load(teacher_temp).to(tl.float32) if CENTERED else 0.0
    start = _row(teacher, 0, b, teacher_outer_stride, teacher_image_stride)
    weight0, top0, total0, moment0 = _teacher_chunk(start, c, teacher_factor, k, inside, CENTERED)
    if T == 2:
        start = _row(teacher, 1, b, teacher_outer_stride, teacher_image_stride)
        weight1, top1, total1, moment1 = _teacher_chunk(
            start, c, teacher_factor, k, inside, CENTERED
        )
    ahead = tl.load(
        _row(student, 0, b, student_outer_stride, student_image_stride) + k, inside, MINUS_INF
    )
    at = parts + b * (V + T) * N + chunk
    _store_parts(at + V * N, plane, top0, total0, moment0)
    if T == 2:
        _store_parts(at + (V + 1) * N, plane, top1, total1, moment1)
    for v in range(V):
        x = ahead.to(tl.float32)
        ahead = tl.load(
            _row(student, v + 1, b, student_outer_stride, student_image_stride) + k,
            inside & _mask(v + 1 < V),
            MINUS_INF,
        )
        top, d, weight = _exponentials(x, LOG2E * student_inv_temp)
        d = tl.where(inside, d, 0.0)
        _store_parts(at, plane, top, tl.sum(weight, 0), tl.sum(weight0 * d, 0))
        if T == 2:
            tl.store(at + 3 * plane, tl.sum(weight1 * d, 0))
        at += N


@triton.jit
def _whole_row(row, plane, N, factor, CHUNKS: tl.constexpr):
    """Maximum and sum of a row from its chunks."""
    top = MINUS_INF
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        top = tl.maximum(top, tl.max(tl.load(row + chunk, chunk < N, MINUS_INF), 0))
    total = 0.0
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        # a row of -inf gives NaN here and from here on
        below = tl.load(row + chunk, chunk < N, MINUS_INF) - top
        total += tl.sum(tl.exp2(below * factor) * tl.load(row + plane + chunk, chunk < N, 0.0), 0)
    return top, total


@triton.jit
def _dot(row, top, dots, teacher_row, teacher_top, plane, N, factor, CHUNKS: tl.constexpr):
    """<teacher weights, student - maximum> of a student row; weights relative to the teacher row's
    maximum."""
    total = 0.0
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = chunk < N
        weight = tl.exp2((tl.load(teacher_row + chunk, inside, MINUS_INF) - teacher_top) * factor)
        below = tl.load(row + chunk, inside, top) - top
        total += tl.sum(
            weight
            * (
                tl.load(dots + chunk, inside, 0.0)
                + below * tl.load(teacher_row + plane + chunk, inside, 0.0)
            ),
            0,
        )
    return total


@triton.jit
def _entropy(row, top, total, plane, N, temp, CHUNKS: tl.constexpr):
    """Of a teacher row, in nats."""
    moment = 0.0  # sum (x - maximum) 2^((x - maximum) factor)
    for first in range(0, N, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = chunk < N
        below = tl.load(row + chunk, inside, MINUS_INF) - top
        shift = tl.where(below == MINUS_INF, 0.0, below) * tl.load(row + plane + chunk, inside, 0.0)
        moment += tl.sum(
            tl.exp2(below * (LOG2E / temp))
            * (tl.load(row + 2 * plane + chunk, inside, 0.0) + shift),
            0,
        )
    return tl.log(total) - moment / (total * temp)


@triton.jit(
    do_not_specialize=("V", "B", "N"), do_not_specialize_on_alignment=("teacher_temp", "temp_kept")
)
def _join(
    parts,  # (4, B, V + T, N)
    teacher_temp,  # (), CENTERED only
    saved,  # (B, V + T, 2) out, KEEP only: maximum, 1 / sum; of probabilities 0, sum
    temp_kept,  # () out, KEEP only; zeros fill the place up to 16 bytes
    losses,  # (B, V) out: of each crop
    entropies,  # (B,) out, CENTERED only: sum over the teacher's rows
    student_inv_temp,
    V,
    B,
    N,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    KEEP: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Grid: B V."""
    b, v = tl.program_id(0) // V, tl.program_id(0) % V
    plane = tl.cast(B, tl.int64) * (V + T) * N
    first_row = tl.cast(b, tl.int64) * (V + T)
    row = parts + (first_row + v) * N
    teacher0 = parts + (first_row + V) * N
    teacher1 = teacher0 + N
    temp = tl.load(teacher_temp).to(tl.float32) if CENTERED else 1.0
    # the maximum of probabilities is kept as 0
    factor, teacher_factor = LOG2E * student_inv_temp, LOG2E / temp
    top, total = _whole_row(row, plane, N, factor, CHUNKS)
    top0, total0 = _whole_row(teacher0, plane, N, teacher_factor, CHUNKS)
    dot0 = _dot(row, top, row + 2 * plane, teacher0, top0, plane, N, teacher_factor, CHUNKS)
    mass0, scale0 = (1.0, 1.0 / total0) if CENTERED else (total0, 1.0)
    meets0 = _meets(v, 0, DIAGONAL)
    mass, dot = meets0 * mass0, meets0 * scale0 * dot0
    if T == 2:
        top1, total1 = _whole_row(teacher1, plane, N, teacher_factor, CHUNKS)
        dot1 = _dot(row, top, row + 3 * plane, teacher1, top1, plane, N, teacher_factor, CHUNKS)
        mass1, scale1 = (1.0, 1.0 / total1) if CENTERED else (total1, 1.0)
        meets1 = _meets(v, 1, DIAGONAL)
        mass, dot = mass + meets1 * mass1, dot + meets1 * scale1 * dot1
    # a crop may be in no pair
    bracket = tl.where(mass == 0, 0.0, mass * tl.log(total) - dot * student_inv_temp)
    tl.store(losses + tl.program_id(0), bracket)
    if CENTERED:
        if v == 0:
            entropy = _entropy(teacher0, top0, total0, plane, N, temp, CHUNKS)
            if T == 2:
                entropy += _entropy(teacher1, top1, total1, plane, N, temp, CHUNKS)
            tl.store(entropies + b, entropy)
    if KEEP:
        at = saved + 2 * (first_row + v)
        tl.store(at, top)
        tl.store(at + 1, 1.0 / total)
        if v == 0:
            at = saved + 2 * (first_row + V)
            tl.store(at, top0)
            tl.store(at + 1, scale0 if CENTERED else total0)
            if T == 2:
                tl.store(at + 2, top1)
                tl.store(at + 3, scale1 if CENTERED else total1)
            if b == 0:
                i = tl.arange(0, 4)
                # up to the center
                tl.store(temp_kept + i, tl.where(i == 0, temp, 0.0), i < 4 - 2 * B * (V + T) % 4)


@triton.jit
def _sum_parts(parts, n, PARTS: tl.constexpr):
    sums = tl.zeros((PARTS,), tl.float64)
    for first in range(0, n, PARTS):
        i = first + tl.arange(0, PARTS)
        sums += tl.load(parts + i, i < n, 0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=("V", "B"))
def _finish(
    losses,  # (B, V)
    entropies,  # (B,), CENTERED only
    loss,  # () out
    entropy,  # () out: 0 without a center
    inv_pairs,
    V,
    B,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: 1."""
    images = tl.cast(B, tl.float64)
    tl.store(loss, (_sum_parts(losses, B * V, PARTS) * inv_pairs / images).to(tl.float32))
    tl.store(
        entropy,
        (_sum_parts(entropies, B, PARTS) / (images * T)).to(tl.float32) if CENTERED else 0.0,
    )


def saved_numbers(B: int, rows: int, K: int) -> int:
    """How many numbers are kept for backward: 2 for each of the V + T rows of B images, the
    temperature, and a center (K,), which begins on a multiple of 16 bytes; K is 0 without one."""
    return (2 * B * rows + 4) // 4 * 4 + K


def _parts_of(saved: Tensor, B: int, rows: int) -> tuple[Tensor, Tensor]:
    """The temperature () and the center (K,) in what is kept for backward."""
    return saved[2 * B * rows :], saved[saved_numbers(B, rows, 0) :]


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: Tensor,
    pairs: int,
    diagonal: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), mean teacher entropy (), teacher_sum (K,) and what `dino_loss_backward` needs, all
    fp32.

    student (V, B, K), teacher (T, B, K) with T of 1 or 2, center (K,): float32, bfloat16 or float16
    on one device, the last axis contiguous; without a center the teacher's rows are probabilities,
    entropy means nothing and teacher_sum is empty. teacher_temp, one number in any float dtype,
    likewise on the device: the host never looks at it.
    """
    (V, B, K), T, centered = student.shape, len(teacher), center is not None
    N, teacher_strides = triton.cdiv(K, CHUNK), teacher.stride()[:2]

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    loss, entropy, teacher_sum = numbers(), numbers(), numbers(K if centered else 0)
    saved = numbers(saved_numbers(B, V + T, K if centered else 0) if with_grad else 0)
    temp_kept, center_kept = _parts_of(saved, B, V + T)
    parts, losses, entropies = numbers(4, B, V + T, N), numbers(B * V), numbers(B)
    center = center.contiguous() if centered else teacher_temp
    with torch.cuda.device_of(student):
        # first: it leaves the teacher's rows in L2
        if centered:
            _sum_columns[triton.cdiv(K, COLUMNS),](
                *(teacher, center, teacher_sum, center_kept),
                B,
                K,
                *teacher_strides,
                T,
                with_grad,
                ROWS,
                COLUMNS,
                **OPTIONS,
            )
        whole = K % CHUNK == 0
        _statistics[B * N,](
            *(student, teacher, center, teacher_temp, parts),
            1 / student_temp,
            V,
            B,
            K,
            N,
            *student.stride()[:2],
            *teacher_strides,
            T,
            centered,
            whole,
            CHUNK,
            **ONE_WARP,
        )
        _join[B * V,](
            *(parts, teacher_temp, saved, temp_kept, losses, entropies),
            1 / student_temp,
            V,
            B,
            N,
            T,
            centered,
            diagonal,
            with_grad,
            CHUNKS,
            **ONE_WARP,
        )
        _finish[1,](
            losses, entropies, loss, entropy, 1 / pairs, V, B, T, centered, PARTS, **OPTIONS
        )
    return loss, entropy, teacher_sum, saved
