"""The gradient of dino_loss (dino_loss.py, which also tells the bytes) with respect to the
student's logits.

    p    = softmax(student[v, b, :] / student_temp)
    grad = upstream / (B pairs student_temp) (mass_v p - Q_v)

A program takes a block of columns of all rows of an image and needs two numbers a row, which
forward has kept: 10 instructions an element. Images are taken in reverse, to begin with what
forward has left in L2. Crops that meet one teacher crop alone come first, so that the loop over the
others has one target. A row is loaded ahead: 24 KiB are on their way to a multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dino_loss import LOG2E, OPTIONS, _mask, _parts_of, _row

# columns of a program: 8 a thread, one 16-byte load of bf16 for each of the V + T rows
BLOCK = 2048


@triton.jit
def _teacher_tile(
    teacher,
    t: tl.constexpr,
    center_tile,
    factor,
    scale,
    saved,
    b,
    k,
    V,
    K,
    outer_stride,
    image_stride,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """scale q[t, b, k] (BLOCK,) and scale times the mass of the whole row."""
    at = saved + 2 * (tl.cast(b, tl.int64) * (V + T) + V + t)
    x = tl.load(_row(teacher, t, b, outer_stride, image_stride) + k, k < K, 0.0).to(tl.float32)
    if CENTERED:
        q = tl.exp2((x - center_tile - tl.load(at)) * factor) * (tl.load(at + 1) * scale)
        mass = scale
    else:
        q, mass = x * scale, tl.load(at + 1) * scale
    return q, mass


@triton.jit
def _student_tile(student, v, b, k, V, K, outer_stride, image_stride):
    return tl.load(_row(student, v, b, outer_stride, image_stride) + k, (k < K) & _mask(v < V), 0.0)


@triton.jit
def _store_gradient(
    grad, s, target, mass, saved, factor, v, b, k, inside, V, B, K, T: tl.constexpr
):
    """Of crop v: mass softmax(student) - target, both scaled."""
    at = saved + 2 * (tl.cast(b, tl.int64) * (V + T) + v)
    g = mass * tl.load(at + 1) * tl.exp2((s.to(tl.float32) - tl.load(at)) * factor) - target
    tl.store(_row(grad, v, b, tl.cast(B, tl.int64) * K, K) + k, g.to(grad.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("V", "B"), do_not_specialize_on_alignment=("temp_kept", "upstream"))
def _gradient(
    upstream,  # ()
    student,  # (V, B, K)
    teacher,  # (T, B, K)
    saved,  # (B, V + T, 2)
    center_kept,  # (K,), CENTERED only
    temp_kept,  # (), CENTERED only
    grad,  # (V, B, K) out, contiguous
    student_inv_temp,
    grad_scale,
    V,
    B,
    K,
    student_outer_stride,
    student_image_stride,
    teacher_outer_stride,
    teacher_image_stride,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: B blocks; blocks = ceil(K / BLOCK)."""
    blocks = tl.cdiv(K, BLOCK)
    b, block = B - 1 - tl.program_id(0) // blocks, tl.program_id(0) % blocks
    k = block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    factor = LOG2E * student_inv_temp
    ahead = _student_tile(student, 0, b, k, V, K, student_outer_stride, student_image_stride)
    c = tl.load(center_kept + k, k < K, 0.0) if CENTERED else 0.0
    teacher_factor = LOG2E / tl.load(temp_kept) if CENTERED else 0.0
    scale = tl.load(upstream).to(tl.float32) * grad_scale
    q0, mass0 = _teacher_tile(
        teacher,
        0,
        c,
        teacher_factor,
        scale,
        saved,
        b,
        k,
        V,
        K,
        teacher_outer_stride,
        teacher_image_stride,
        T,
        CENTERED,
    )
    q1, mass1 = q0 * 0.0, mass0 * 0.0
    if T == 2:
        q1, mass1 = _teacher_tile(
            teacher,
            1,
            c,
            teacher_factor,
            scale,
            saved,
            b,
            k,
            V,
            K,
            teacher_outer_stride,
            teacher_image_stride,
            T,
            CENTERED,
        )
    if not DIAGONAL:  # crops that meet the other teacher crop alone; none where T is 1
        for v in tl.static_range(T):
            s = ahead
            ahead = _student_tile(
                student, v + 1, b, k, V, K, student_outer_stride, student_image_stride
            )
            target, mass = (q1, mass1) if v == 0 else (q0, mass0)
            _store_gradient(
                grad, s, target, mass, saved, factor, v, b, k, (k < K) & _mask(v < V), V, B, K, T
            )
    target, mass = q0 + q1, mass0 + mass1
    for v in range(0 if DIAGONAL else T, V):
        s = ahead
        ahead = _student_tile(
            student, v + 1, b, k, V, K, student_outer_stride, student_image_stride
        )
        _store_gradient(grad, s, target, mass, saved, factor, v, b, k, k < K, V, B, K, T)


def dino_loss_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    saved: Tensor,
    student_temp: float,
    centered: bool,
    pairs: int,
    diagonal: bool,
) -> Tensor:
    """The gradient (V, B, K) in student's dtype; upstream () in any float dtype on the device, the
    rest as in `dino_loss`."""
    (V, B, K), T = student.shape, len(teacher)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    temp_kept, center_kept = _parts_of(saved, B, V + T)
    with torch.cuda.device_of(student):
        _gradient[B * triton.cdiv(K, BLOCK),](
            upstream,
            student,
            teacher,
            saved,
            center_kept,
            temp_kept,
            grad,
            1 / student_temp,
            1 / (B * pairs * student_temp),
            V,
            B,
            K,
            *student.stride()[:2],
            *teacher.stride()[:2],
            T,
            centered,
            diagonal,
            BLOCK,
            **OPTIONS,
        )
    return grad
