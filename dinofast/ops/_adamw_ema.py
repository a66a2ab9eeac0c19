"""grad_norms, adamw_ema_ and ema_: schemas, C++ implementations, fakes, and the public functions with their checks.

Axes: n tensors in a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._choice import _C, KERNEL_DTYPES, array_of, choose, library

# Lists of tensors go to the kernel as addresses: an array for each would cost 1 us a tensor. Autograd has nothing to do here.
library.define("grad_norms(Tensor[] grads) -> Tensor")
library.define("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
               "Tensor(d!)[] steps, Tensor(e!)[] teachers, bool[] averaged, Tensor coefficients, Tensor skip, Tensor lr, "
               "Tensor weight_decay, float beta1, float beta2, float eps, Tensor momentum) -> ()")
library.define("ema_(Tensor(a!)[] teachers, Tensor[] students, Tensor momentum, Tensor skip) -> ()")


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [x.numel() for x in tensors]


def _dtype_codes(tensors: Sequence[Tensor]) -> list[int]:
    return [KERNEL_DTYPES.index(x.dtype) for x in tensors]


def _mark_written(tensors: Sequence[Tensor]) -> None:
    """Backward through a value saved before then raises, as after any in-place operation of torch."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def _grad_norms_cpu(grads: list[Tensor]) -> Tensor:
    norms = torch.empty(len(grads), dtype=torch.float32)
    _C.grad_norms(_addresses(grads), _dtype_codes(grads), _sizes(grads), norms.numpy(), torch.get_num_threads())
    return norms


def _adamw_ema_cpu(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
                   steps: list[Tensor], teachers: list[Tensor], averaged: list[bool], coefficients: Tensor, skip: Tensor,
                   lr: Tensor, weight_decay: Tensor, beta1: float, beta2: float, eps: float, momentum: Tensor) -> None:
    if skip.item():
        return
    teacher = iter(_addresses(teachers))
    _C.adamw_ema_(_addresses(params), _addresses(grads), _dtype_codes(grads), _addresses(exp_avgs), _addresses(exp_avg_sqs),
                  _addresses(steps), [next(teacher) if has else 0 for has in averaged], _sizes(params),
                  array_of(coefficients.float().contiguous()), lr.item(), weight_decay.item(), beta1, beta2, eps,
                  momentum.item(), torch.get_num_threads())
    _mark_written([*params, *exp_avgs, *exp_avg_sqs, *steps, *teachers])


def _ema_cpu(teachers: list[Tensor], students: list[Tensor], momentum: Tensor, skip: Tensor) -> None:
    if skip.item():
        return
    _C.ema_(_addresses(teachers), _addresses(students), _dtype_codes(students), _sizes(teachers), momentum.item(),
            torch.get_num_threads())
    _mark_written(teachers)


library.impl("grad_norms", _grad_norms_cpu, "CPU")
library.impl("adamw_ema_", _adamw_ema_cpu, "CPU")
library.impl("ema_", _ema_cpu, "CPU")
torch.library.register_fake("dinofast::grad_norms", lambda grads: grads[0].new_empty(len(grads), dtype=torch.float32),
                            lib=library)
torch.library.register_fake("dinofast::adamw_ema_", lambda *_: None, lib=library)
torch.library.register_fake("dinofast::ema_", lambda *_: None, lib=library)


def _choose_for_lists(op: str, impl: str | None, narrow: Sequence[Tensor], *wide: Sequence[Tensor | None]) -> str:
    """As `choose`, for tensors of any kernel's dtype (`narrow`) with fp32 ones (`wide`) that lie like them in memory."""
    chosen = choose(op, impl, *narrow) if narrow else "reference"
    if chosen == "reference":
        return chosen
    fp32 = [x for xs in wide for x in xs if x is not None]
    if ({x.dtype for x in fp32} <= {torch.float32} and len({x.device for x in (*narrow, *fp32)}) == 1
            and (all(map(Tensor.is_contiguous, (*narrow, *fp32))) or _lie_alike(narrow, *wide))):
        return chosen
    if impl is None:
        return "reference"
    raise ValueError(f"impl={impl!r} takes tensors on one device, contiguous, and float32 where they are not gradients or "
                     "students: use impl='reference'.")


def _lie_alike(*lists: Sequence[Tensor | None]) -> bool:
    """Whether the tensors of every row are all contiguous or all channels_last; a single number lies like anything."""
    rows = [[x for x in row if x is not None and x.numel() > 1] for row in zip(*lists, strict=True)]
    return all(any(all(x.is_contiguous(memory_format=layout) for x in row)
                   for layout in (torch.contiguous_format, torch.channels_last)) for row in rows)


def _check_lists(**lists: Sequence[Tensor | None]) -> None:
    """Equal lengths, and equal shapes in every row."""
    (first_name, first), *others = lists.items()
    shapes = [x.shape for x in first]
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{name} has {len(tensors)} tensors and {first_name} has {len(first)}: give as many.")
        for i, (x, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if x is not None and x.shape != shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(x.shape)}: expected {tuple(shape)}, that of {first_name}[{i}].")


def _scalar(number: float | Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else torch.scalar_tensor(number, dtype=torch.float64)


@torch.no_grad()
def grad_norms(grads: Sequence[Tensor], impl: str | None = None) -> Tensor:
    """The L2 norm (n,) of each of n tensors of any shape, float32; see `reference.grad_norms`.

    impl: as in `dino_loss`. The C++ kernel sums in float64 and takes float32, bfloat16 and float16, contiguous; the number of
    threads changes no bit. Raises ValueError for no tensors.
    """
    if not grads:
        raise ValueError("grads is empty: give at least one tensor.")
    if _choose_for_lists("grad_norms", impl, grads) == "reference":
        return reference.grad_norms(grads)
    return torch.ops.dinofast.grad_norms(grads)


@torch.no_grad()
def adamw_ema_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
               steps: Sequence[Tensor], teachers: Sequence[Tensor | None], coefficients: Tensor, skip: Tensor, *,
               lr: float | Tensor, weight_decay: float | Tensor, betas: tuple[float, float], eps: float,
               momentum: float | Tensor, impl: str | None = None) -> None:
    """Clip, AdamW (arXiv 1711.05101) and the teacher's average in one pass over memory; see `reference.adamw_ema_`.

    params, grads, exp_avgs, exp_avg_sqs, teachers: n tensors, equal in shape; a teacher may be None. steps: n float32 tensors
    (). coefficients (n,): each gradient's factor. skip (): bool; where true nothing changes. lr, weight_decay, momentum:
    numbers, or tensors of one number, which under torch.compile save recompiling when they change.
    impl: as in `dino_loss`. The C++ kernel takes float32 with gradients in float32, bfloat16 or float16, all of a parameter
    contiguous or all channels_last; a call with anything else goes to the reference. The number of threads changes no bit.
    Raises ValueError for lists that differ in length or shape.
    """
    _check_lists(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, teachers=teachers)
    if len(steps) != len(params) or any(step.ndim for step in steps) or coefficients.shape != (len(params),):
        raise ValueError(f"steps has shapes {[tuple(s.shape) for s in steps]} and coefficients {tuple(coefficients.shape)}: "
                         f"expected {len(params)} tensors () and one ({len(params)},), to go with params.")
    if _choose_for_lists("adamw_ema_", impl, grads, params, exp_avgs, exp_avg_sqs, teachers, steps) == "reference":
        return reference.adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, steps, teachers, coefficients, skip, lr=lr,
                                    weight_decay=weight_decay, betas=betas, eps=eps, momentum=momentum)
    torch.ops.dinofast.adamw_ema_(
        params, grads, exp_avgs, exp_avg_sqs, steps, [t for t in teachers if t is not None], [t is not None for t in teachers],
        coefficients, skip, _scalar(lr), _scalar(weight_decay), *betas, eps, _scalar(momentum))


@torch.no_grad()
def ema_(teachers: Sequence[Tensor], students: Sequence[Tensor], momentum: float | Tensor, skip: Tensor | None = None,
         impl: str | None = None) -> None:
    """The teacher's average, `teacher <- momentum teacher + (1 - momentum) student`, for n tensors at once, in place.

        ema_(list(teacher.parameters()), list(student.parameters()), 0.996)

    teachers, students: n tensors, equal in shape. skip (): bool; where true nothing changes. No gradient is recorded.
    impl: as in `dino_loss`. The C++ kernel takes float32 teachers of float32, bfloat16 or float16 students, a pair contiguous
    or channels_last. Raises ValueError for lists that differ in length or shape.
    """
    _check_lists(teachers=teachers, students=students)
    if _choose_for_lists("ema_", impl, students, teachers) == "reference":
        return reference.ema_(teachers, students, momentum, skip)
    torch.ops.dinofast.ema_(teachers, students, _scalar(momentum), torch.zeros((), dtype=torch.bool) if skip is None else skip)
