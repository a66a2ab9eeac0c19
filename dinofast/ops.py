"""The seam between Python and the kernels. Per operation: the torch.library schema, implementations (C++ on the CPU, Triton on
CUDA), fake, backward, and the public function with its checks. A call that no kernel can take goes to `dinofast.reference`.

Axes: B images, V student crops (the first two global), K prototypes; n tensors in a list.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference

try:
    from . import _C
except ImportError as error:  # no compiler when the package was installed
    _C, _NO_CPP = None, f"the C++ core dinofast._C does not load ({error}); install again on a machine with a C++17 compiler"
else:
    _NO_CPP = ""
_NO_TRITON = "" if importlib.util.find_spec("triton") else "Triton is not installed; pip install triton"  # imported when used

_KERNELS = {  # operation -> device type -> the implementation that is faster than the reference
    "dino_loss": {"cpu": "cpp", "cuda": "triton"},
    "adamw_ema_": {"cpu": "cpp"},
    "ema_": {"cpu": "cpp"},
    "grad_norms": {"cpu": "cpp"},
}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IMPLS = (None, "reference", "cpp", "triton")

_library = torch.library.Library("dinofast", "DEF")


def paths() -> dict[str, dict[str, str]]:
    """Operation -> device type ("cpu", "cuda") -> the implementation it takes there and why not a faster one."""
    def path(kernel: str | None) -> str:
        if kernel is None:
            return "reference (plain torch): no kernel for this device"
        return f"reference (plain torch): {_missing(kernel)}" if _missing(kernel) else kernel
    return {op: {device: path(kernels.get(device)) for device in ("cpu", "cuda")} for op, kernels in _KERNELS.items()}


def check_required() -> None:
    """Raise `ValueError` when DINOFAST_REQUIRE names a kind of kernel that is unknown or cannot run here."""
    for kind in filter(None, os.environ.get("DINOFAST_REQUIRE", "").split(",")):
        if kind not in _IMPLS[2:]:
            raise ValueError(f"DINOFAST_REQUIRE names '{kind}': this version knows {', '.join(_IMPLS[2:])}.")
        if reason := _missing(kind):
            raise ValueError(f"DINOFAST_REQUIRE names {kind}, but {reason}.")


def _missing(kernel: str) -> str:
    """Why this kind of kernel cannot run here; empty if it can."""
    return {"cpp": _NO_CPP, "triton": _NO_TRITON}[kernel]


def _interpreted() -> bool:
    """Whether Triton kernels run on the CPU, thousands of times slower: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _choose(op: str, impl: str | None, *tensors: Tensor) -> str:
    device = tensors[0].device.type
    kernel = _KERNELS[op].get(device)
    takes_dtypes = all(t.dtype in _KERNEL_DTYPES for t in tensors)
    if impl is None:
        if kernel is None or not takes_dtypes:
            return "reference"
        if reason := _missing(kernel):
            if kernel in os.environ.get("DINOFAST_REQUIRE", "").split(","):
                raise RuntimeError(f"DINOFAST_REQUIRE names {kernel}, but {reason}.")
            if not torch.compiler.is_compiling():  # which cannot trace a warning
                warnings.warn(f"dinofast.{op} runs in plain torch, many times slower: {reason}.", stacklevel=1)
            return "reference"
        return kernel
    if impl not in _IMPLS:
        raise ValueError(f"impl is {impl!r}: use one of {', '.join(map(repr, _IMPLS))}.")
    if impl == "reference":
        return impl
    if impl != kernel and not (impl == "triton" == _KERNELS[op].get("cuda") and device == "cpu" and _interpreted()):
        raise ValueError(f"impl={impl!r} has no {op} for {device} tensors: leave impl out to take the best there is.")
    if not takes_dtypes:
        raise ValueError(f"impl={impl!r} takes float32, bfloat16 and float16, not {[str(t.dtype) for t in tensors]}: "
                         "use impl='reference'.")
    if reason := _missing(impl):
        raise RuntimeError(f"impl={impl!r} was asked for, but {reason}.")
    return impl


def _is_known(number: float | Tensor) -> bool:
    """Whether its value can be looked at without waiting for a device; not while being traced."""
    return not isinstance(number, Tensor) or (
        type(number) is Tensor and number.device.type == "cpu" and not torch.compiler.is_compiling())


def _array(x: Tensor) -> np.ndarray:
    """The memory of x, bfloat16 as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).detach().numpy()


# ---------------------------------------------------------------------------------------------------------------- dino_loss

# The kernel has the gradient in hand while it reads the logits, so the operation returns it, for an upstream of 1, and backward
# only multiplies. In float16 it would underflow before the loss scale could lift it: there it is kept as
# 2^14 (n_v softmax - Q_v), and backward applies the rest of the factor together with the upstream gradient.
_library.define("dino_loss(Tensor student, Tensor teacher, Tensor center, float student_temp, Tensor teacher_temp, "
                "bool with_grad, str impl) -> (Tensor loss, Tensor entropy, Tensor teacher_sum, Tensor grad)")
_HALF_GRAD_SCALE = 2.0 ** 14


def _gradient_scale(student: Tensor, student_temp: float) -> float:
    """1 / (B P student_temp), the factor before (n_v softmax - Q_v)."""
    crops, images = student.shape[:2]
    return 1 / (images * 2 * (crops - 1) * student_temp)


def _dino_loss_kernel(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: Tensor,
                      with_grad: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = (x if x.stride(-1) == 1 else x.contiguous() for x in (student, teacher))
    grad_scale = _HALF_GRAD_SCALE if student.dtype == torch.float16 else _gradient_scale(student, student_temp)
    if impl == "triton":
        from .kernels.dino_loss import dino_loss
        if teacher_temp.device != student.device:
            teacher_temp = torch.full((), teacher_temp.item(), dtype=torch.float32, device=student.device)
        return dino_loss(student, teacher, center.contiguous(), student_temp, teacher_temp, with_grad, grad_scale)
    teacher_sum = torch.empty(student.shape[2], dtype=torch.float32)
    grad = torch.empty(student.shape if with_grad else 0, dtype=student.dtype)                          # (V, B, K)
    loss, entropy = _C.dino_loss(
        _array(student), _array(teacher), _array(center.float().contiguous()), student_temp, teacher_temp.item(),
        _array(teacher_sum), _array(grad) if with_grad else None, grad_scale, torch.get_num_threads())
    return torch.scalar_tensor(loss, dtype=torch.float32), torch.scalar_tensor(entropy, dtype=torch.float32), teacher_sum, grad


def _dino_loss_fake(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: Tensor,
                    with_grad: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def stat(*shape: int) -> Tensor:
        return student.new_empty(shape, dtype=torch.float32)
    return stat(), stat(), stat(student.shape[2]), student.new_empty(student.shape if with_grad else (0,))


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dinofast.dino_loss.default(*args)


def _dino_loss_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (_DinoLoss.apply if args[5] else _below_autograd)(*args)


class _DinoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: Tensor,
                with_grad: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _below_autograd(student, teacher, center, student_temp, teacher_temp, with_grad, impl)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or backward would be handed zeros of the size of the logits
        ctx.save_for_backward(output[3])
        ctx.scale = _gradient_scale(student, student_temp) / _HALF_GRAD_SCALE if student.dtype == torch.float16 else 1.0
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if upstream is None:
            return None, *nothing
        if torch.is_grad_enabled():
            raise NotImplementedError("dino_loss has no second derivative (create_graph=True): use impl='reference'.")
        grad, = ctx.saved_tensors
        if _is_known(upstream) and upstream.item() * ctx.scale == 1:  # the usual case, and a pass over the gradient saved
            return grad, *nothing
        return grad * (upstream * ctx.scale), *nothing


_library.impl("dino_loss", _dino_loss_kernel, "CPU")
_library.impl("dino_loss", _dino_loss_kernel, "CUDA")
torch.library.register_fake("dinofast::dino_loss", _dino_loss_fake, lib=_library)
_library.impl("dino_loss", _dino_loss_autograd, "Autograd")


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float | Tensor,
              impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The DINO loss over materialised logits (arXiv 2104.14294, equation 2 with multi-crop); see `reference.dino_loss`.

    student (V, B, K) with V >= 2, teacher (2, B, K), center (K,): float32, bfloat16, float16 or float64, all on one device;
    rows may be strided. student_temp and teacher_temp > 0; teacher_temp may be a tensor of one number, which under
    torch.compile saves recompiling when it changes. impl: None takes the fastest; "reference", "cpp" (CPU) or
    "triton" (CUDA; on the CPU only under TRITON_INTERPRET=1) that one or an error.
    Returns the loss (), differentiable once in `student` only; the mean teacher entropy () in nats; the sum of the 2 B teacher
    rows (K,). All float32 (float64 for a float64 student), whatever autocast says. NaN or infinity gives a loss that is not
    finite, unless it means a probability of 0 (-inf in `teacher`, inf in `center`). The number of threads changes no bit.
    Raises ValueError for shapes, dtypes, devices, temperatures and `impl` that do not fit; RuntimeError if an implementation
    asked for by `impl` or DINOFAST_REQUIRE is absent.
    """
    if student.ndim != 3 or student.shape[0] < 2 or student.shape[1] < 1 or student.shape[2] < 1:
        raise ValueError(f"student has shape {tuple(student.shape)}: expected (V, B, K) with V of 2 or more, B and K not 0.")
    _, images, prototypes = student.shape
    if teacher.shape != (2, images, prototypes):
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}: expected {(2, images, prototypes)} to go with student "
                         f"{tuple(student.shape)}.")
    if center.shape != (prototypes,):
        raise ValueError(f"center has shape {tuple(center.shape)}: expected ({prototypes},).")
    for name, x in (("student", student), ("teacher", teacher), ("center", center)):
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}: expected a floating-point tensor.")
        if x.device != student.device:
            raise ValueError(f"{name} is on {x.device} but student is on {student.device}: move them to one device.")
    if not student_temp > 0:
        raise ValueError(f"student_temp is {student_temp}: expected a number above 0.")
    if isinstance(teacher_temp, Tensor) and teacher_temp.numel() != 1:
        raise ValueError(f"teacher_temp has shape {tuple(teacher_temp.shape)}: expected one number.")
    if _is_known(teacher_temp) and not teacher_temp > 0:
        raise ValueError(f"teacher_temp is {float(teacher_temp)}: expected a number above 0.")
    teacher, center = teacher.detach(), center.detach()
    impl = _choose("dino_loss", impl, student, teacher)
    if impl == "reference":
        return reference.dino_loss(student, teacher, center, student_temp, teacher_temp)
    if not isinstance(teacher_temp, Tensor):
        teacher_temp = torch.scalar_tensor(teacher_temp, dtype=torch.float64)
    with_grad = student.requires_grad and torch.is_grad_enabled()
    loss, entropy, teacher_sum, _ = torch.ops.dinofast.dino_loss(
        student, teacher, center, student_temp, teacher_temp.detach(), with_grad, impl)
    return loss, entropy, teacher_sum


# --------------------------------------------------------------------------------------------- grad_norms, adamw_ema_, ema_

# Lists of tensors go to the kernel as addresses: an array for each would cost 1 us a tensor. Autograd has nothing to do here.
_library.define("grad_norms(Tensor[] grads) -> Tensor")
_library.define("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
                "Tensor(d!)[] steps, Tensor(e!)[] teachers, bool[] averaged, Tensor coefficients, Tensor skip, Tensor lr, "
                "Tensor weight_decay, float beta1, float beta2, float eps, Tensor momentum) -> ()")
_library.define("ema_(Tensor(a!)[] teachers, Tensor[] students, Tensor momentum, Tensor skip) -> ()")


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [x.numel() for x in tensors]


def _dtype_codes(tensors: Sequence[Tensor]) -> list[int]:
    return [_KERNEL_DTYPES.index(x.dtype) for x in tensors]


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
                  _array(coefficients.float().contiguous()), lr.item(), weight_decay.item(), beta1, beta2, eps, momentum.item(),
                  torch.get_num_threads())
    _mark_written([*params, *exp_avgs, *exp_avg_sqs, *steps, *teachers])


def _ema_cpu(teachers: list[Tensor], students: list[Tensor], momentum: Tensor, skip: Tensor) -> None:
    if skip.item():
        return
    _C.ema_(_addresses(teachers), _addresses(students), _dtype_codes(students), _sizes(teachers), momentum.item(),
            torch.get_num_threads())
    _mark_written(teachers)


_library.impl("grad_norms", _grad_norms_cpu, "CPU")
_library.impl("adamw_ema_", _adamw_ema_cpu, "CPU")
_library.impl("ema_", _ema_cpu, "CPU")
torch.library.register_fake("dinofast::grad_norms", lambda grads: grads[0].new_empty(len(grads), dtype=torch.float32),
                            lib=_library)
torch.library.register_fake("dinofast::adamw_ema_", lambda *_: None, lib=_library)
torch.library.register_fake("dinofast::ema_", lambda *_: None, lib=_library)


def _choose_for_lists(op: str, impl: str | None, narrow: Sequence[Tensor], *wide: Sequence[Tensor | None]) -> str:
    """As `_choose`, for tensors of any kernel's dtype (`narrow`) with fp32 ones (`wide`) that lie like them in memory."""
    chosen = _choose(op, impl, *narrow) if narrow else "reference"
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
