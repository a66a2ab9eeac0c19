"""adamw_ema_ (arXiv 1711.05101, then the teacher's average of arXiv 2104.14294), grad_norms and
ema_, on n tensors at once.

    norm = sqrt(sum grad^2)                                             grad_norms, per tensor
    g = coefficient grad;  step += 1                                    adamw_ema_
    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    p = p - lr weight_decay p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    teacher = momentum teacher + (1 - momentum) p                       adamw_ema_, ema_
    param_copy, teacher_copy = p, teacher, rounded: only where these are masters of 16-bit tensors

Bytes an element: adamw_ema_ reads p, grad, m, v, teacher and writes p, m, v, teacher, 36 in fp32,
and the 2 of each copy; grad_norms reads 4 before it, and ema_ alone moves 12. That is the floor,
and each array is touched once. The chunks of adamw_ema_ are taken in reverse, to begin with the
gradients that grad_norms has left in L2.

Any set of tensors is one launch (multi_tensor.py).

The counters of the steps are moved by a program of their own, which also forms the factors of each
tensor, 1 - beta^step in fp64: the programs of a tensor then read factors that nobody writes. Where
`skip` is true every program leaves at once.

No atomics: a norm is the fp32 sums of its chunks, each in a tree, added in fp64 in their order.
Divisions and roots are rounded as in IEEE 754: memory leaves time for some 300 instructions an
element. Offsets are 64-bit. Block sizes are reasoned, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .multi_tensor import TRITON_DTYPES, chunk_at, dtypes_of, tables_of, tensor_at

# chunk of adamw_ema_ and ema_: 8 numbers a thread, two 16-byte loads of each fp32 array
BLOCK, WARPS = 1024, 4
# chunk of grad_norms, which has one array: 16 a thread, four 16-byte loads of fp32
NORM_BLOCK, NORM_WARPS = 4096, 8
PARTS = 1024  # chunk sums that are added at a time
TENSORS = 128  # whose factors one program forms
# a product and a sum in one: Triton 3.10 will not do so unasked
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}

# Rows of the tables of addresses (rows, n), and columns of the factors (n, COLUMNS): 32 bytes a
# tensor.
P, GRAD, M, V, TEACHER, P_COPY, TEACHER_COPY, STEP = map(tl.constexpr, range(8))
EMA_TEACHER, EMA_STUDENT, EMA_COPY = map(tl.constexpr, range(3))
COEFFICIENT, RATE, INV_ROOT, DECAY, KEEP, SHARE, COLUMNS = map(tl.constexpr, (0, 1, 2, 3, 4, 5, 8))


@triton.jit
def _average(old, now, keep, share):
    """keep old + share now, from the nearer end: exact where nothing changes, and where all
    does."""
    gap = now - old
    return tl.where(share < 0.5, old + share * gap, now - keep * gap)


@triton.jit
def _mix(keep):
    """An average's two factors in fp32, from the first in any dtype."""
    keep = keep.to(tl.float64)
    return keep.to(tl.float32), (1 - keep).to(tl.float32)


@triton.jit
def _chunk_square_sum(x, i, inside):
    numbers = tl.load(x + i, inside, 0.0).to(tl.float32)
    return tl.sum(numbers * numbers, 0)


@triton.jit(do_not_specialize=("first", "n"))
def _square_sums(
    chunks,  # (chunks of the call, 2): tensor, chunk of it
    sizes,  # (n,)
    table,  # (1, n): addresses of the gradients
    sums,  # (chunks of the call,) out
    first,
    n,
    GRAD_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: the chunks, from `first` on, of gradients of one dtype."""
    at = first + tl.program_id(0)
    tensor, begin, left = chunk_at(chunks, sizes, at, BLOCK)
    x, _ = tensor_at(table, 0, tensor, n, begin, GRAD_DTYPE, VECTOR)
    i = tl.arange(0, BLOCK)
    if left >= BLOCK:  # without a mask, or there would be no 128-bit loads
        total = _chunk_square_sum(x, i, tl.full((BLOCK,), True, tl.int1))
    else:
        total = _chunk_square_sum(x, i, i < left)
    tl.store(sums + at, total)


@triton.jit
def _norms(
    sums,  # (chunks of the call,)
    starts,  # (n,): each tensor's first chunk
    sizes,  # (n,)
    norms,  # (n,) out
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: n."""
    tensor = tl.program_id(0)
    start, count = tl.load(starts + tensor), tl.cdiv(tl.load(sizes + tensor), BLOCK)
    totals = tl.zeros((PARTS,), tl.float64)
    for done in range(0, count, PARTS):
        i = done + tl.arange(0, PARTS)
        totals += tl.load(sums + start + i, i < count, 0.0).to(tl.float64)
    tl.store(norms + tensor, tl.sqrt(tl.sum(totals, 0)).to(tl.float32))


# Scalars are often views into a schedule, now aligned and now not: that must not compile anything
# anew in the middle of a run.
_SCALARS = ("coefficients", "skip", "lr", "weight_decay", "momentum")


@triton.jit(do_not_specialize=("n",), do_not_specialize_on_alignment=_SCALARS)
def _prepare(
    table,  # (8, n): addresses
    coefficients,  # (n,)
    skip,  # () bool
    lr,  # ()
    weight_decay,  # ()
    momentum,  # ()
    factors,  # (n, COLUMNS) out
    n,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    TENSORS: tl.constexpr,
):
    """Grid: ceil(n / TENSORS). Moves the counters of the steps."""
    if tl.load(skip):
        return
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)  # (TENSORS,)
    inside = i < n
    counter = tl.load(table + STEP * n + i, inside, 0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, inside, 0.0) + 1
    tl.store(counter, step, inside)
    step = step.to(tl.float64)
    rate = tl.load(lr).to(tl.float64)
    decay = (rate * tl.load(weight_decay).to(tl.float64)).to(tl.float32)
    keep, share = _mix(tl.load(momentum))
    row = factors + i * COLUMNS
    tl.store(row + COEFFICIENT, tl.load(coefficients + i, inside, 0.0).to(tl.float32), inside)
    tl.store(row + RATE, (rate / (1 - tl.exp(step * LOG_BETA1))).to(tl.float32), inside)
    tl.store(row + INV_ROOT, (1 / tl.sqrt(1 - tl.exp(step * LOG_BETA2))).to(tl.float32), inside)
    tl.store(row + DECAY, tl.zeros_like(i).to(tl.float32) + decay, inside)
    tl.store(row + KEEP, tl.zeros_like(i).to(tl.float32) + keep, inside)
    tl.store(row + SHARE, tl.zeros_like(i).to(tl.float32) + share, inside)


@triton.jit
def _adamw_ema_chunk(
    table,
    factors,
    tensor,
    n,
    begin,
    i,
    inside,
    eps,
    keep1,
    share1,
    keep2,
    share2,
    GRAD_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    TEACHER_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    p, _ = tensor_at(table, P, tensor, n, begin, tl.float32, VECTOR)
    grad, _ = tensor_at(table, GRAD, tensor, n, begin, GRAD_DTYPE, VECTOR)
    m, _ = tensor_at(table, M, tensor, n, begin, tl.float32, VECTOR)
    v, _ = tensor_at(table, V, tensor, n, begin, tl.float32, VECTOR)
    teacher, has_teacher = tensor_at(table, TEACHER, tensor, n, begin, tl.float32, VECTOR)
    old_p, old_m, old_v = tl.load(p + i, inside), tl.load(m + i, inside), tl.load(v + i, inside)
    old_teacher = tl.load(teacher + i, inside & has_teacher)
    row = factors + tensor.to(tl.int64) * COLUMNS
    g = tl.load(row + COEFFICIENT) * tl.load(grad + i, inside).to(tl.float32)
    mean = _average(old_m, g, keep1, share1)
    square = keep2 * old_v + share2 * g * g  # a difference would make NaN of an infinity
    moved = tl.div_rn(
        tl.load(row + RATE) * mean, tl.sqrt_rn(square) * tl.load(row + INV_ROOT) + eps
    )
    now = old_p - tl.load(row + DECAY) * old_p - moved
    average = _average(old_teacher, now, tl.load(row + KEEP), tl.load(row + SHARE))
    tl.store(m + i, mean, inside)
    tl.store(v + i, square, inside)
    tl.store(p + i, now, inside)
    tl.store(teacher + i, average, inside & has_teacher)
    if P_DTYPE is not None:
        copy, has_copy = tensor_at(table, P_COPY, tensor, n, begin, P_DTYPE, VECTOR)
        tl.store(copy + i, now.to(P_DTYPE), inside & has_copy)
    if TEACHER_DTYPE is not None:
        copy, has_copy = tensor_at(table, TEACHER_COPY, tensor, n, begin, TEACHER_DTYPE, VECTOR)
        tl.store(copy + i, average.to(TEACHER_DTYPE), inside & has_copy)


@triton.jit(do_not_specialize=("first", "n"), do_not_specialize_on_alignment=_SCALARS)
def _adamw_ema(
    chunks,  # (chunks of the call, 2): tensor, chunk of it
    sizes,  # (n,)
    table,  # (8, n): addresses
    factors,  # (n, COLUMNS)
    skip,  # () bool
    first,
    n,
    eps,
    keep1,
    share1,
    keep2,
    share2,
    GRAD_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    TEACHER_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: the chunks, from `first` on, of tensors of one set of dtypes; a dtype of None stands
    for no copy."""
    tensor, begin, left = chunk_at(
        chunks, sizes, first + tl.num_programs(0) - 1 - tl.program_id(0), BLOCK
    )
    if tl.load(skip):  # after the chunk, so that the two are waited for together
        return
    i = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _adamw_ema_chunk(
            table,
            factors,
            tensor,
            n,
            begin,
            i,
            tl.full((BLOCK,), True, tl.int1),
            eps,
            keep1,
            share1,
            keep2,
            share2,
            GRAD_DTYPE,
            P_DTYPE,
            TEACHER_DTYPE,
            VECTOR,
        )
    else:
        _adamw_ema_chunk(
            table,
            factors,
            tensor,
            n,
            begin,
            i,
            i < left,
            eps,
            keep1,
            share1,
            keep2,
            share2,
            GRAD_DTYPE,
            P_DTYPE,
            TEACHER_DTYPE,
            VECTOR,
        )


@triton.jit
def _ema_chunk(
    table,
    tensor,
    n,
    begin,
    i,
    inside,
    keep,
    share,
    STUDENT_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    teacher, _ = tensor_at(table, EMA_TEACHER, tensor, n, begin, tl.float32, VECTOR)
    student, _ = tensor_at(table, EMA_STUDENT, tensor, n, begin, STUDENT_DTYPE, VECTOR)
    average = _average(
        tl.load(teacher + i, inside), tl.load(student + i, inside).to(tl.float32), keep, share
    )
    tl.store(teacher + i, average, inside)
    if COPY_DTYPE is not None:
        copy, has_copy = tensor_at(table, EMA_COPY, tensor, n, begin, COPY_DTYPE, VECTOR)
        tl.store(copy + i, average.to(COPY_DTYPE), inside & has_copy)


@triton.jit(do_not_specialize=("first", "n"), do_not_specialize_on_alignment=_SCALARS)
def _ema(
    chunks,  # (chunks of the call, 2): tensor, chunk of it
    sizes,  # (n,)
    table,  # (3, n): addresses
    momentum,  # ()
    skip,  # () bool
    first,
    n,
    STUDENT_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: the chunks, from `first` on, of tensors of one set of dtypes; a dtype of None stands
    for no copy."""
    tensor, begin, left = chunk_at(chunks, sizes, first + tl.program_id(0), BLOCK)
    keep, share = _mix(tl.load(momentum))
    if tl.load(skip):
        return
    i = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _ema_chunk(
            table,
            tensor,
            n,
            begin,
            i,
            tl.full((BLOCK,), True, tl.int1),
            keep,
            share,
            STUDENT_DTYPE,
            COPY_DTYPE,
            VECTOR,
        )
    else:
        _ema_chunk(
            table, tensor, n, begin, i, i < left, keep, share, STUDENT_DTYPE, COPY_DTYPE, VECTOR
        )


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each of n tensors: (n,), fp32. They are float32, bfloat16 or float16, dense,
    on one device."""
    with torch.cuda.device_of(grads[0]):
        tables = tables_of(grads, tuple(dtypes_of(grads)), NORM_BLOCK)
        table, aligned = tables.addresses(grads)
        sums, norms = (
            torch.empty(k, dtype=torch.float32, device=tables.device)
            for k in (tables.n_chunks, len(grads))
        )
        options = OPTIONS | {"num_warps": NORM_WARPS}
        for dtype, first, count in tables.launches:
            vector = 16 // dtype.itemsize if aligned else 1
            _square_sums[count,](
                *(tables.chunks, tables.sizes, table, sums),
                first,
                len(grads),
                TRITON_DTYPES[dtype],
                vector,
                NORM_BLOCK,
                **options,
            )
        _norms[len(grads),](sums, tables.starts, tables.sizes, norms, NORM_BLOCK, PARTS, **OPTIONS)
    return norms


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    teachers: Sequence[Tensor | None],
    param_copies: Sequence[Tensor | None],
    teacher_copies: Sequence[Tensor | None],
    coefficients: Tensor,
    skip: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    momentum: Tensor,
) -> None:
    """As `reference.adamw_ema_`, on one device, all tensors of an index dense and alike in layout.

    params, exp_avgs, exp_avg_sqs, steps, teachers: float32; grads, param_copies, teacher_copies:
    float32, bfloat16, float16. coefficients (n,), contiguous; skip, lr, weight_decay, momentum: one
    number each, which the host never looks at.
    """
    n = len(params)
    kinds = tuple(
        zip(dtypes_of(grads), dtypes_of(param_copies), dtypes_of(teacher_copies), strict=True)
    )
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    with torch.cuda.device_of(params[0]):
        tables = tables_of(params, kinds, BLOCK)
        table, aligned = tables.addresses(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            teachers,
            param_copies,
            teacher_copies,
            counters=steps,
        )
        factors = torch.empty(n, COLUMNS.value, dtype=torch.float32, device=tables.device)
        numbers = coefficients, skip, lr, weight_decay, momentum
        _prepare[triton.cdiv(n, TENSORS),](table, *numbers, factors, n, *logs, TENSORS, **OPTIONS)
        betas = beta1, 1 - beta1, beta2, 1 - beta2
        for kind, first, count in tables.launches:
            dtypes, vector = map(TRITON_DTYPES.get, kind), 4 if aligned else 1
            _adamw_ema[count,](
                *(tables.chunks, tables.sizes, table, factors, skip),
                first,
                n,
                eps,
                *betas,
                *dtypes,
                vector,
                BLOCK,
                **OPTIONS,
            )


def ema_(
    teachers: Sequence[Tensor],
    students: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    momentum: Tensor,
    skip: Tensor,
) -> None:
    """As `reference.ema_`: teachers float32, students and copies float32, bfloat16 or float16; the
    rest as in `adamw_ema_`."""
    kinds = tuple(zip(dtypes_of(students), dtypes_of(copies), strict=True))
    with torch.cuda.device_of(teachers[0]):
        tables = tables_of(teachers, kinds, BLOCK)
        table, aligned = tables.addresses(teachers, students, copies)
        for kind, first, count in tables.launches:
            dtypes, vector = map(TRITON_DTYPES.get, kind), 4 if aligned else 1
            _ema[count,](
                *(tables.chunks, tables.sizes, table, momentum, skip),
                first,
                len(teachers),
                *dtypes,
                vector,
                BLOCK,
                **OPTIONS,
            )
