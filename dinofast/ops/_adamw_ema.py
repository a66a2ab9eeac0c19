"""grad_norms, adamw_ema_ and ema_: schemas, C++ and Triton implementations, fakes, and the public
functions with their checks.

Axes: n tensors in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import reference
from ._checks import check_for_reference, check_lists, check_momentum, check_steps
from ._choice import _C, KERNEL_DTYPES, choose, library, on_device

# Lists of tensors go to a kernel as addresses: an array for each would cost 1 us a tensor. Autograd
# has nothing to do here. Where a list may have holes, those present are passed with a list of which
# there are: torch cannot functionalise `Tensor(a!)?[]`. A CUDA graph would replay the upload of
# addresses from memory that is gone: Inductor is told to leave it be.
_tags = (torch.Tag.cudagraph_unsafe,)
library.define("grad_norms(Tensor[] grads, str impl) -> Tensor", tags=_tags)
library.define(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
    "exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] teachers, bool[] averaged, Tensor(f!)[] "
    "param_copies, bool[] param_copied, Tensor(g!)[] teacher_copies, bool[] teacher_copied, Tensor "
    "coefficients, Tensor skip, Tensor lr, Tensor weight_decay, float beta1, float beta2, float "
    "eps, Tensor momentum, str impl) -> ()",
    tags=_tags,
)
library.define(
    "ema_(Tensor(a!)[] teachers, Tensor[] students, Tensor(b!)[] copies, bool[] copied, Tensor "
    "momentum, Tensor skip, str impl) -> ()",
    tags=_tags,
)


def _without_holes(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    return [x for x in tensors if x is not None], [x is not None for x in tensors]


def _with_holes(tensors: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    rest = iter(tensors)
    return [next(rest) if is_there else None for is_there in there]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [x.numel() for x in tensors]


def _dtype_codes(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else KERNEL_DTYPES.index(x.dtype) for x in tensors]


def _mark_written(tensors: Sequence[Tensor]) -> None:
    """Backward through a value saved before then raises, as after any in-place operation of
    torch."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def _grad_norms_kernel(grads: list[Tensor], impl: str) -> Tensor:
    if impl == "triton":
        from ..kernels.adamw_ema import grad_norms

        return grad_norms(grads)
    norms = torch.empty(len(grads), dtype=torch.float32)
    _C.grad_norms(
        _addresses(grads),
        _dtype_codes(grads),
        _sizes(grads),
        norms.numpy(),
        torch.get_num_threads(),
    )
    return norms


def _adamw_ema_kernel(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    teachers: list[Tensor],
    averaged: list[bool],
    param_copies: list[Tensor],
    param_copied: list[bool],
    teacher_copies: list[Tensor],
    teacher_copied: list[bool],
    coefficients: Tensor,
    skip: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    momentum: Tensor,
    impl: str,
) -> None:
    written = [*params, *exp_avgs, *exp_avg_sqs, *steps, *teachers, *param_copies, *teacher_copies]
    all_teachers, all_param_copies, all_teacher_copies = (
        _with_holes(*pair)
        for pair in (
            (teachers, averaged),
            (param_copies, param_copied),
            (teacher_copies, teacher_copied),
        )
    )
    if impl == "triton":
        from ..kernels.adamw_ema import adamw_ema_

        skip, lr, weight_decay, momentum = (
            on_device(params[0].device, x) for x in (skip, lr, weight_decay, momentum)
        )
        adamw_ema_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            all_teachers,
            all_param_copies,
            all_teacher_copies,
            coefficients.contiguous(),
            skip,
            lr,
            weight_decay,
            beta1,
            beta2,
            eps,
            momentum,
        )
    elif not skip.item():
        _C.adamw_ema_(
            _addresses(params),
            _addresses(grads),
            _dtype_codes(grads),
            _addresses(exp_avgs),
            _addresses(exp_avg_sqs),
            _addresses(steps),
            _addresses(all_teachers),
            _addresses(all_param_copies),
            _dtype_codes(all_param_copies),
            _addresses(all_teacher_copies),
            _dtype_codes(all_teacher_copies),
            _sizes(params),
            coefficients.detach().float().contiguous().numpy(),
            lr.item(),
            weight_decay.item(),
            beta1,
            beta2,
            eps,
            momentum.item(),
            torch.get_num_threads(),
        )
    _mark_written(written)


def _ema_kernel(
    teachers: list[Tensor],
    students: list[Tensor],
    copies: list[Tensor],
    copied: list[bool],
    momentum: Tensor,
    skip: Tensor,
    impl: str,
) -> None:
    all_copies = _with_holes(copies, copied)
    if impl == "triton":
        from ..kernels.adamw_ema import ema_

        ema_(
            teachers,
            students,
            all_copies,
            *(on_device(teachers[0].device, x) for x in (momentum, skip)),
        )
    elif not skip.item():
        _C.ema_(
            _addresses(teachers),
            _addresses(students),
            _dtype_codes(students),
            _addresses(all_copies),
            _dtype_codes(all_copies),
            _sizes(teachers),
            momentum.item(),
            torch.get_num_threads(),
        )
    _mark_written([*teachers, *copies])


for _name, _kernel in (
    ("grad_norms", _grad_norms_kernel),
    ("adamw_ema_", _adamw_ema_kernel),
    ("ema_", _ema_kernel),
):
    for _device in ("CPU", "CUDA"):
        library.impl(_name, _kernel, _device)
torch.library.register_fake(
    "dinofast::grad_norms",
    lambda grads, impl: grads[0].new_empty(len(grads), dtype=torch.float32),
    lib=library,
)
torch.library.register_fake("dinofast::adamw_ema_", lambda *_: None, lib=library)
torch.library.register_fake("dinofast::ema_", lambda *_: None, lib=library)


def _choose_for_lists(
    op: str,
    impl: str | None,
    narrow: Sequence[Sequence[Tensor | None]],
    wide: Sequence[Sequence[Tensor | None]] = (),
    scalars: Sequence[Tensor] = (),
) -> str:
    """As `choose`, for lists of any kernel's dtype (`narrow`) and of fp32 (`wide`) whose rows lie
    alike in memory."""
    any_dtype, fp32 = ([x for xs in lists for x in xs if x is not None] for lists in (narrow, wide))
    chosen = choose(op, impl, *any_dtype) if any_dtype else "reference"
    fp32 += scalars
    everything = [*any_dtype, *fp32]
    if chosen == "reference":
        check_for_reference(op, everything)
        return chosen
    if (
        {x.dtype for x in fp32} <= {torch.float32}
        and len({x.device for x in everything}) == 1
        and (all(map(Tensor.is_contiguous, everything)) or _lie_alike(*narrow, *wide))
    ):
        return chosen
    if impl is None:
        check_for_reference(op, everything)
        return "reference"
    raise ValueError(
        f"impl={impl!r} takes tensors on one device, contiguous, and float32 where they are not "
        "gradients, students or copies: use impl='reference'."
    )


def _lie_alike(*lists: Sequence[Tensor | None]) -> bool:
    """Whether the tensors of every row are all contiguous or all channels_last; a single number
    lies like anything."""
    rows = [[x for x in row if x is not None and x.numel() > 1] for row in zip(*lists, strict=True)]
    return all(
        any(
            all(x.is_contiguous(memory_format=layout) for x in row)
            for layout in (torch.contiguous_format, torch.channels_last)
        )
        for row in rows
    )


def _scalar(number: float | Tensor) -> Tensor:
    return (
        number if isinstance(number, Tensor) else torch.scalar_tensor(number, dtype=torch.float64)
    )


@torch.no_grad()
def grad_norms(grads: Sequence[Tensor], impl: str | None = None) -> Tensor:
    """The L2 norm (n,) of each of n tensors of any shape, float32; see `reference.grad_norms`.

    impl: as in `dino_loss`. The kernels take float32, bfloat16 and float16, contiguous or
    channels_last. C++ sums in float64; the number of threads changes no bit. Triton sums in
    float32, from 1e19 on to infinity, as torch does, and gives the same bits every time. Raises
    ValueError for no tensors.
    """
    if not grads:
        raise ValueError("grads is empty: give at least one tensor.")
    impl = _choose_for_lists("grad_norms", impl, [grads])
    return (
        reference.grad_norms(grads)
        if impl == "reference"
        else torch.ops.dinofast.grad_norms(grads, impl)
    )


@torch.no_grad()
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
    impl: str | None = None,
) -> None:
    """Clip, AdamW (arXiv 1711.05101) and the teacher's average in one pass over memory; see
    `reference.adamw_ema_`.

    params, grads, exp_avgs, exp_avg_sqs, teachers: n tensors, equal in shape; a teacher may be
    None. steps: n float32 tensors (). coefficients (n,): each gradient's factor. skip (): bool;
    where true nothing changes. lr, weight_decay, momentum: numbers, or tensors of one number, which
    under torch.compile save recompiling when they change. param_copies, teacher_copies: None, or n
    tensors or None, which params and teachers are rounded into: the 16-bit tensors of a network
    whose float32 masters they are. impl: as in `dino_loss`. The kernels take float32 with gradients
    and copies in float32, bfloat16 or float16, all of a parameter contiguous or all channels_last;
    a call with anything else goes to the reference. The number of threads changes no bit. Raises
    ValueError for lists that differ in length or shape, and for a copy of a teacher that is None.
    """
    nothing = [None] * len(params)
    param_copies, teacher_copies = (
        nothing if x is None else x for x in (param_copies, teacher_copies)
    )
    check_lists(
        "params",
        params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        teachers=teachers,
        param_copies=param_copies,
        teacher_copies=teacher_copies,
    )
    check_steps(len(params), steps, coefficients)
    for i, (copy, teacher) in enumerate(zip(teacher_copies, teachers, strict=True)):
        if copy is not None and teacher is None:
            raise ValueError(
                f"teacher_copies[{i}] is a tensor but teachers[{i}] is None: give both, or None "
                "for the copy."
            )
    impl = _choose_for_lists(
        "adamw_ema_",
        impl,
        [grads, param_copies, teacher_copies],
        [params, exp_avgs, exp_avg_sqs, teachers],
        steps,
    )
    if impl == "reference":
        lists = params, grads, exp_avgs, exp_avg_sqs, steps, teachers
        return reference.adamw_ema_(
            *lists,
            coefficients,
            skip,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            momentum=momentum,
            param_copies=param_copies,
            teacher_copies=teacher_copies,
        )
    torch.ops.dinofast.adamw_ema_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        *_without_holes(teachers),
        *_without_holes(param_copies),
        *_without_holes(teacher_copies),
        coefficients,
        skip,
        _scalar(lr),
        _scalar(weight_decay),
        *betas,
        eps,
        _scalar(momentum),
        impl,
    )


@torch.no_grad()
def ema_(
    teachers: Iterable[Tensor],
    students: Iterable[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
    impl: str | None = None,
    *,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """The teacher's average, `teacher <- momentum teacher + (1 - momentum) student`, for n tensors
    at once, in place.

        ema_(teacher.parameters(), student.parameters(), 0.996)

    teachers, students: n tensors, equal in shape; a 16-bit teacher would stand still, as its steps
    round to nothing: keep it in float32. skip (): bool; where true nothing changes. copies: None,
    or n tensors or None, which the teachers are rounded into. No gradient is recorded. impl: as in
    `dino_loss`. The kernels take float32 teachers with students and copies in float32, bfloat16 or
    float16, all of a row contiguous or channels_last. Raises ValueError for lists that differ in
    length or shape, and for a momentum outside 0 .. 1.
    """
    teachers, students = list(teachers), list(students)
    copies = [None] * len(teachers) if copies is None else copies
    check_momentum(momentum)
    check_lists("teachers", teachers, students=students, copies=copies)
    impl = _choose_for_lists("ema_", impl, [students, copies], [teachers])
    if impl == "reference":
        return reference.ema_(teachers, students, momentum, skip, copies)
    if skip is None:
        skip = torch.zeros((), dtype=torch.bool, device=teachers[0].device)
    torch.ops.dinofast.ema_(
        teachers, students, *_without_holes(copies), _scalar(momentum), skip, impl
    )
