"""The specification: every operation of dinofast in plain torch. Never fast, always right.

Kernels, tests and benchmarks are compared with these functions; `ops` falls back to them. What
`ops.color` must give, Pillow says. Axes: B images, V student crops (the first two global), K
prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DINO loss over materialized logits (arXiv 2104.14294, equation 2 with multi-crop, and
    section 3.1).

        q[t, b, :] = softmax((teacher[t, b, :] - center) / teacher_temp)    no gradient
        loss = soft_cross_entropy over the pairs (t, v) with t != v, divided by their number,
               2 (V - 1) for T = 2

    student (V, B, K), teacher (T, B, K): any float dtype, statistics in fp32 (fp64 for fp64);
    center (K,). Returns three tensors: the loss (); the mean entropy () of the rows of q in nats,
    without gradient; and the sum over all T B rows of `teacher` (K,), from which the next center is
    made, without gradient.
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        x = teacher.to(wide)  # (T, B, K)
        log_q = torch.log_softmax((x - center.to(wide)) / teacher_temp, dim=-1)  # (T, B, K)
        q = log_q.exp()
        entropy = -(q * log_q.clamp_min(torch.finfo(wide).min)).sum(-1).mean()  # 0 log 0 is 0
        teacher_sum = x.sum((0, 1))  # (K,)
    loss = soft_cross_entropy(student, q, student_temp, diagonal=False)
    return loss / pairs(len(student), len(teacher), diagonal=False), entropy, teacher_sum


def soft_cross_entropy(
    student: Tensor, targets: Tensor, student_temp: float, diagonal: bool
) -> Tensor:
    """Cross-entropy of student crops with teacher probabilities, summed over pairs, averaged over
    images.

        for t in 0 .. T-1:
            for v in 0 .. V-1, v != t unless diagonal:
                log_p = log_softmax(student[v, b, :] / student_temp)
                loss += mean_b sum_k -targets[t, b, k] log_p[k]

    student (V, B, K) logits, targets (T, B, K): any float dtype, statistics in fp32 (fp64 for
    fp64). The loss ().
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    log_p = torch.log_softmax(student.to(wide) / student_temp, dim=-1)  # (V, B, K)
    loss = log_p.new_zeros(())
    for t, q in enumerate(targets.detach().to(wide)):
        for v in range(len(student)):
            if diagonal or v != t:
                loss = loss - (q * log_p[v]).sum(-1).mean()
    return loss


def pairs(crops: int, teachers: int, diagonal: bool) -> int:
    """How many pairs (t, v) there are; without the diagonal, those with t != v."""
    return crops * teachers - (0 if diagonal else min(crops, teachers))


def center_update(center: Tensor, batch_center: Tensor, momentum: float) -> Tensor:
    """`center <- momentum center + (1 - momentum) batch_center`; both (1, K) or (K,), fp32 (arXiv
    2104.14294, equation 4)."""
    return center * momentum + batch_center * (1 - momentum)


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each of n tensors, of any shape and float dtype: (n,), fp32."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.stack(torch._foreach_norm([g.detach() for g in grads], 2, wide)).float()


def clip_coefficients(norms: Tensor, max_norm: float, mode: str = "tensor") -> Tensor:
    """The factor `min(1, max_norm / (norm + 1e-6))` for each of n gradient tensors: norms and
    result (n,), fp32.

    mode "tensor": each with its own norm, as in the official `clip_gradients`; "global": all with
    the norm of all of them together, as in `torch.nn.utils.clip_grad_norm_`. `max_norm` 0 clips
    nothing.
    """
    if not max_norm:
        return torch.ones_like(norms)
    return (
        max_norm / ((norms.norm().expand_as(norms) if mode == "global" else norms) + 1e-6)
    ).clamp(max=1.0)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    teachers: Sequence[Tensor | None],
    coefficients: Tensor,
    skip: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    momentum: float | Tensor,
    param_copies: Sequence[Tensor | None] | None = None,
    teacher_copies: Sequence[Tensor | None] | None = None,
) -> None:
    """AdamW (arXiv 1711.05101) on clipped gradients, then the teacher's average, in place.

        for each tensor i, unless skip:
            g = coefficients[i] grad;  step += 1
            p = (1 - lr weight_decay) p
            m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
            p = p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
            teacher = momentum teacher + (1 - momentum) p
            param_copy, teacher_copy = p, teacher, rounded

    params, grads, exp_avgs, exp_avg_sqs, teachers: n tensors of equal shapes; a teacher may be
    None. steps: n fp32 tensors (). coefficients (n,): clip factor over loss scale. skip (): bool,
    decided on the device; where true nothing changes, because every factor becomes that of the
    identity. param_copies, teacher_copies: what the network computes with when `params` and
    `teachers` are the masters of 16-bit tensors; each may be None.
    """
    beta1, beta2 = betas
    one = 1.0 - skip.double()  # 0 makes each line the identity
    rate, decay = lr * one, weight_decay * one
    for i, (p, m, v, step) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        g = torch.where(skip, 0.0, grads[i].to(p.dtype) * coefficients[i].to(p.dtype))
        step.add_(one.to(step.dtype))
        t = step.double().clamp(min=1)
        p.mul_(1 - rate * decay)
        m.lerp_(g, ((1 - beta1) * one).to(m.dtype))
        v.mul_(1 - (1 - beta2) * one).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**t).sqrt()).add_(eps)
        p.sub_(m.div(denominator).mul_(rate / (1 - beta1**t)))
    if param_copies is not None:
        _round_into(param_copies, params, skip)
    averaged = {i: teacher for i, teacher in enumerate(teachers) if teacher is not None}
    ema_(
        list(averaged.values()),
        [params[i] for i in averaged],
        momentum,
        skip,
        None if teacher_copies is None else [teacher_copies[i] for i in averaged],
    )


def ema_(
    teachers: Sequence[Tensor],
    students: Sequence[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """`teacher <- momentum teacher + (1 - momentum) student` for n pairs of equal shape, in place;
    the identity where skip.

    copies: what each teacher is then rounded into, or None.
    """
    share = (1 - momentum) * (1.0 if skip is None else 1.0 - skip.double())
    for teacher, student in zip(teachers, students, strict=True):
        teacher.mul_(1 - share).add_(student.to(teacher.dtype) * share)
    if copies is not None:
        _round_into(copies, teachers, skip)


def _round_into(
    copies: Sequence[Tensor | None], tensors: Sequence[Tensor], skip: Tensor | None
) -> None:
    for copy, x in zip(copies, tensors, strict=True):
        if copy is not None:
            copy.copy_(x if skip is None else torch.where(skip, copy, x.to(copy.dtype)))


def sgd_(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor,
    skip: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float,
) -> None:
    """SGD with momentum as torch's, in place: `b = momentum b + grad + weight_decay p; p = p - lr
    b`; identity where skip."""
    one = 1.0 - skip.double()
    update = torch.where(skip, 0.0, grad + weight_decay * param)
    buffer.mul_(1 - (1 - momentum) * one).add_(update)
    param.sub_(buffer * (lr * one))


def lars_(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor,
    skip: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float,
    eta: float,
) -> None:
    """LARS (arXiv 1708.03888) as the official code has it, in place; the identity where skip.

    Tensors with one dimension get neither decay nor adaptation; the others have `grad +
    weight_decay p` scaled by `eta ||p|| / ||grad + weight_decay p||` (1 where either norm is 0).
    """
    one = 1.0 - skip.double()
    if param.ndim != 1:
        grad = grad + weight_decay * param
        p_norm, g_norm = param.norm(), grad.norm()
        grad = grad * torch.where((p_norm > 0) & (g_norm > 0), eta * p_norm / g_norm, 1.0)
    buffer.mul_(1 - (1 - momentum) * one).add_(torch.where(skip, 0.0, grad))
    param.sub_(buffer * (lr * one))


def normalize(crops: Tensor, norm_lut: Tensor) -> Tensor:
    """Levels by a table: `out[n, c, y, x] = norm_lut[c, crops[n, c, y, x]]`.

    crops (N, 3, H, W) of uint8, strided in any way; norm_lut (3, 256). Returns (N, 3, H, W) in
    norm_lut's dtype, contiguous.
    """
    return torch.stack(
        [row[levels.long()] for row, levels in zip(norm_lut, crops.unbind(1), strict=True)], 1
    ).contiguous()
