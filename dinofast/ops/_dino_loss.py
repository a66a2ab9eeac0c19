"""dino_loss: schema, C++ and Triton implementations, fake, backward, and the public function with its checks.

Axes: B images, V student crops (the first two global), K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._choice import _C, array_of, choose, is_known, library

# The kernel has the gradient in hand while it reads the logits, so the operation returns it, for an upstream of 1, and backward
# only multiplies. In float16 it would underflow before the loss scale could lift it: there it is kept as
# 2^14 (n_v softmax - Q_v), and backward applies the rest of the factor together with the upstream gradient.
library.define("dino_loss(Tensor student, Tensor teacher, Tensor center, float student_temp, Tensor teacher_temp, "
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
        from ..kernels.dino_loss import dino_loss
        if teacher_temp.device != student.device:
            teacher_temp = torch.full((), teacher_temp.item(), dtype=torch.float32, device=student.device)
        return dino_loss(student, teacher, center.contiguous(), student_temp, teacher_temp, with_grad, grad_scale)
    teacher_sum = torch.empty(student.shape[2], dtype=torch.float32)
    grad = torch.empty(student.shape if with_grad else 0, dtype=student.dtype)                          # (V, B, K)
    loss, entropy = _C.dino_loss(
        array_of(student), array_of(teacher), array_of(center.float().contiguous()), student_temp, teacher_temp.item(),
        array_of(teacher_sum), array_of(grad) if with_grad else None, grad_scale, torch.get_num_threads())
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
        if is_known(upstream) and upstream.item() * ctx.scale == 1:  # the usual case, and a pass over the gradient saved
            return grad, *nothing
        return grad * (upstream * ctx.scale), *nothing


library.impl("dino_loss", _dino_loss_kernel, "CPU")
library.impl("dino_loss", _dino_loss_kernel, "CUDA")
torch.library.register_fake("dinofast::dino_loss", _dino_loss_fake, lib=library)
library.impl("dino_loss", _dino_loss_autograd, "Autograd")


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
    if is_known(teacher_temp) and not teacher_temp > 0:
        raise ValueError(f"teacher_temp is {float(teacher_temp)}: expected a number above 0.")
    teacher, center = teacher.detach(), center.detach()
    impl = choose("dino_loss", impl, student, teacher)
    if impl == "reference":
        return reference.dino_loss(student, teacher, center, student_temp, teacher_temp)
    if not isinstance(teacher_temp, Tensor):
        teacher_temp = torch.scalar_tensor(teacher_temp, dtype=torch.float64)
    with_grad = student.requires_grad and torch.is_grad_enabled()
    loss, entropy, teacher_sum, _ = torch.ops.dinofast.dino_loss(
        student, teacher, center, student_temp, teacher_temp.detach(), with_grad, impl)
    return loss, entropy, teacher_sum
