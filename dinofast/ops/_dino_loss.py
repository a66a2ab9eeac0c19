"""dino_loss and soft_cross_entropy: one schema, C++ and Triton implementations, fakes, backward,
and the public functions.

Axes: B images, V student crops, T teacher crops, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ._choice import _C, KERNEL_DTYPES, choose, is_known, library, on_device

# The loss is a sum over images and pairs, divided by the images and by `pairs`. `saved` is what
# backward needs. The C++ kernel has a row's gradient in hand while it reads the logits, so `saved`
# is the gradient (V, B, K) for an upstream of 1, and backward only multiplies; of a float16 student
# in float32, as float16 might underflow before the loss scale lifts it. The Triton kernels read the
# logits twice in any case, for statistics and for the gradient: so the gradient is left to
# backward, where the upstream is known, and `saved` holds statistics of the rows, the temperature
# and the center.
library.define(
    "dino_loss(Tensor student, Tensor teacher, Tensor? center, float student_temp, Tensor "
    "teacher_temp, int pairs, bool diagonal, bool with_grad, str impl) -> (Tensor loss, Tensor "
    "entropy, Tensor teacher_sum, Tensor saved)"
)
library.define(
    "dino_loss_backward(Tensor upstream, Tensor student, Tensor teacher, Tensor saved, float "
    "student_temp, bool centered, int pairs, bool diagonal) -> Tensor"
)
_LARGE = 0 if _C is None else _C.large  # bytes


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of an earlier result where it is large: fresh memory costs more than the kernel
    (csrc/cpu/recycled.h)."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    if n_bytes < _LARGE:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(_C.empty(n_bytes)).view(dtype).view(shape)


def _saved_dtype(student: Tensor) -> torch.dtype:
    return torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32


def _dino_loss_cpp(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: Tensor,
    pairs: int,
    diagonal: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (student.shape[0], *teacher.shape)  # V, T, B, K
    terms = float(pairs * sizes[2])
    teacher_sum = torch.empty(0 if center is None else sizes[3], dtype=torch.float32)
    dtype = _saved_dtype(student)
    grad = _empty(student.shape, dtype) if with_grad else torch.empty(0, dtype=dtype)  # (V, B, K)
    center = None if center is None else center.float().contiguous()
    loss, entropy = _C.dino_loss(
        student.data_ptr(),
        KERNEL_DTYPES.index(student.dtype),
        student.stride()[:2],
        teacher.data_ptr(),
        KERNEL_DTYPES.index(teacher.dtype),
        teacher.stride()[:2],
        None if center is None else center.data_ptr(),
        sizes,
        student_temp,
        teacher_temp.item(),
        terms,
        diagonal,
        None if center is None else teacher_sum.data_ptr(),
        grad.data_ptr() if with_grad else None,
        1 / (terms * student_temp),
        grad.nbytes >= _LARGE,
        torch.get_num_threads(),
    )
    return (
        torch.scalar_tensor(loss, dtype=torch.float32),
        torch.scalar_tensor(entropy, dtype=torch.float32),
        teacher_sum,
        grad,
    )


def _dino_loss_kernel(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: Tensor,
    pairs: int,
    diagonal: bool,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = _rows(student), _rows(teacher)
    if impl == "cpp":
        return _dino_loss_cpp(
            student, teacher, center, student_temp, teacher_temp, pairs, diagonal, with_grad
        )
    from ..kernels.dino_loss import dino_loss as kernel

    return kernel(
        student,
        teacher,
        center,
        student_temp,
        on_device(student.device, teacher_temp),
        pairs,
        diagonal,
        with_grad,
    )


def _dino_loss_backward_kernel(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    saved: Tensor,
    student_temp: float,
    centered: bool,
    pairs: int,
    diagonal: bool,
) -> Tensor:
    from ..kernels.dino_loss_backward import dino_loss_backward as kernel

    return kernel(
        upstream, _rows(student), _rows(teacher), saved, student_temp, centered, pairs, diagonal
    )


def _dino_loss_fake(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: Tensor,
    pairs: int,
    diagonal: bool,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def numbers(*shape: int) -> Tensor:
        return student.new_empty(shape, dtype=torch.float32)

    if impl == "cpp":
        saved = student.new_empty(student.shape if with_grad else (0,), dtype=_saved_dtype(student))
    else:
        from ..kernels.dino_loss import saved_numbers

        crops, images, prototypes = student.shape
        kept = 0 if center is None else prototypes
        saved = numbers(saved_numbers(images, crops + teacher.shape[0], kept) if with_grad else 0)
    return numbers(), numbers(), numbers(0 if center is None else student.shape[2]), saved


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dinofast.dino_loss.default(*args)


def _above_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with_grad = args[7]
    return (_DinoLoss.apply if with_grad else _below_autograd)(*args)


class _DinoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return _keep(ctx, _below_autograd(*args), args)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, upstream), *(None,) * 8


def _keep(ctx: Any, output: tuple[Tensor, ...], args: tuple) -> tuple[Tensor, ...]:
    """The output, after what backward needs has been kept."""
    student, teacher, center, student_temp, _, pairs, diagonal, _, ctx.impl = args
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward would be handed zeros of the size of the logits
    if ctx.impl == "cpp":
        ctx.save_for_backward(output[3])
        ctx.dtype = student.dtype
    else:
        # which autograd refuses to save; nobody can change it
        ctx.teacher = teacher if teacher.is_inference() else None
        ctx.save_for_backward(student, None if teacher.is_inference() else teacher, output[3])
        ctx.rest = student_temp, center is not None, pairs, diagonal
    return output


def _gradient(ctx: Any, upstream: Tensor | None) -> Tensor | None:
    """The gradient of the student's logits."""
    if upstream is None:
        return None
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "dino_loss has no second derivative (create_graph=True): use impl='reference'."
        )
    if ctx.impl == "cpp":
        (grad,) = ctx.saved_tensors
        # the usual case, and a pass over the gradient saved
        if is_known(upstream) and upstream.item() == 1:
            return grad.to(ctx.dtype)
        return (grad * upstream).to(ctx.dtype)
    student, teacher, saved = ctx.saved_tensors
    teacher = ctx.teacher if teacher is None else teacher
    return torch.ops.dinofast.dino_loss_backward(upstream, student, teacher, saved, *ctx.rest)


for _device in ("CPU", "CUDA"):
    library.impl("dino_loss", _dino_loss_kernel, _device)
    library.impl("dino_loss_backward", _dino_loss_backward_kernel, _device)
torch.library.register_fake("dinofast::dino_loss", _dino_loss_fake, lib=library)
torch.library.register_fake(
    "dinofast::dino_loss_backward",
    lambda upstream, student, *_: student.new_empty(student.shape),
    lib=library,
)
library.impl("dino_loss", _above_autograd, "Autograd")


def _call(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation, unless a derivative is asked for that it has not got."""
    student = args[0]
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(student).tangent is not None:
        raise NotImplementedError("dino_loss has no forward-mode derivative: use impl='reference'.")
    return torch.ops.dinofast.dino_loss(*args)


def _check_logits(student: Tensor, student_temp: float, **others: Tensor) -> None:
    if student.ndim != 3 or 0 in student.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)}: expected (V, B, K), none of them 0."
        )
    for name, x in (("student", student), *others.items()):
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}: expected a floating-point tensor.")
        if x.device != student.device:
            raise ValueError(
                f"{name} is on {x.device} but student is on {student.device}: move them to one "
                "device."
            )
    if not student_temp > 0:
        raise ValueError(f"student_temp is {student_temp}: expected a number above 0.")


def _check_targets(name: str, targets: Tensor, student: Tensor, diagonal: bool) -> int:
    """The number of pairs (t, v)."""
    crops, images, prototypes = student.shape
    if targets.ndim != 3 or targets.shape[0] < 1 or targets.shape[1:] != (images, prototypes):
        raise ValueError(
            f"{name} has shape {tuple(targets.shape)}: expected (T, {images}, {prototypes}) to go "
            f"with student {tuple(student.shape)}."
        )
    pairs = reference.pairs(crops, targets.shape[0], diagonal)
    if not pairs:
        raise ValueError(
            f"student has {crops} crop and {name} has 1: without the pairs of the same crop there "
            "is nothing to compare; give one of them a second crop."
        )
    return pairs


def _choose(op: str, impl: str | None, student: Tensor, targets: Tensor) -> str:
    chosen = choose(op, impl, student, targets)
    if chosen == "triton" and targets.shape[0] > 2:
        if impl is not None:
            raise ValueError(
                f"impl='triton' takes 1 or 2 teacher crops, not {targets.shape[0]}: use "
                "impl='reference'."
            )
        return "reference"
    return chosen


def dino_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DINO loss over materialized logits (arXiv 2104.14294, equation 2 with multi-crop); see
    `reference.dino_loss`.

    student (V, B, K), teacher (T, B, K), center (K,): float32, bfloat16, float16 or float64, all on
    one device; rows may be strided; student and teacher may be lists of tensors (B, K), the chunks
    of one tensor without a copy. Crops count alike on both sides (in DINO, T = 2 global crops come
    first): crop v and teacher crop t = v make no pair. student_temp and teacher_temp > 0;
    teacher_temp may be a tensor of one number, which under torch.compile saves recompiling when it
    changes. impl: None takes the fastest; "reference", "cpp" (CPU) or "triton" (CUDA, T of 1 or 2;
    on the CPU only under TRITON_INTERPRET=1) that one or an error. Returns the loss (),
    differentiable once in `student` only; the mean teacher entropy () in nats; the sum of the T B
    teacher rows (K,). All float32 (float64 for a float64 student), whatever autocast says. NaN or
    infinity gives a loss that is not finite, unless it means a probability of 0 (-inf in `teacher`,
    inf in `center`). The number of threads changes no bit. Raises ValueError for shapes, dtypes,
    devices, temperatures and `impl` that do not fit; RuntimeError if an implementation asked for by
    `impl` or DINOFAST_REQUIRE is absent.
    """
    student, teacher = _stacked(student), _stacked(teacher).detach()
    _check_logits(student, student_temp, teacher=teacher, center=center)
    pairs = _check_targets("teacher", teacher, student, diagonal=False)
    if center.shape != student.shape[2:]:
        raise ValueError(f"center has shape {tuple(center.shape)}: expected ({student.shape[2]},).")
    if isinstance(teacher_temp, Tensor) and teacher_temp.numel() != 1:
        raise ValueError(
            f"teacher_temp has shape {tuple(teacher_temp.shape)}: expected one number."
        )
    if is_known(teacher_temp) and not teacher_temp > 0:
        raise ValueError(f"teacher_temp is {float(teacher_temp)}: expected a number above 0.")
    center = center.detach()
    impl = _choose("dino_loss", impl, student, teacher)
    if impl == "reference":
        return reference.dino_loss(student, teacher, center, student_temp, teacher_temp)
    if not isinstance(teacher_temp, Tensor):
        teacher_temp = torch.scalar_tensor(teacher_temp, dtype=torch.float64)
    with_grad = student.requires_grad and torch.is_grad_enabled()
    loss, entropy, teacher_sum, _ = _call(
        student, teacher, center, student_temp, teacher_temp.detach(), pairs, False, with_grad, impl
    )
    return loss, entropy, teacher_sum


def soft_cross_entropy(
    student: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    student_temp: float = 0.1,
    *,
    diagonal: bool = True,
    reduction: str = "sum",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of every student crop with every row of teacher probabilities; see
    `reference.soft_cross_entropy`.

    For training code that centers, or balances by Sinkhorn-Knopp, by itself (DINOv2, arXiv
    2304.07193). student: logits (V, B, K), or a list of V tensors (B, K), the chunks of one tensor
    without a copy. targets: probabilities (T, B, K), or a list, without gradient. diagonal: False
    leaves out the pairs with t = v. reduction: "sum" over the pairs of the mean over images, or the
    "mean" of both. dtypes, devices, impl and errors as in `dino_loss`. Returns the loss (), float32
    (float64 for float64 logits), differentiable once in `student` only.
    """
    student, targets = _stacked(student), _stacked(targets).detach()
    _check_logits(student, student_temp, targets=targets)
    pairs = _check_targets("targets", targets, student, diagonal)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}: use 'sum' or 'mean'.")
    impl = _choose("soft_cross_entropy", impl, student, targets)
    if impl == "reference":
        loss = reference.soft_cross_entropy(student, targets, student_temp, diagonal)
        return loss / pairs if reduction == "mean" else loss
    with_grad = student.requires_grad and torch.is_grad_enabled()
    return _call(
        student,
        targets,
        None,
        student_temp,
        torch.ones(()),
        pairs if reduction == "mean" else 1,
        diagonal,
        with_grad,
        impl,
    )[0]


def _stacked(x: Tensor | Sequence[Tensor]) -> Tensor:
    """n tensors (B, K) as one (n, B, K): a view where they lie side by side in one memory, as
    chunks do, or else a copy."""
    if isinstance(x, Tensor):
        return x
    if not x:
        raise ValueError("a list of crops is empty: give at least one tensor (B, K).")
    if any(piece.shape != x[0].shape or piece.ndim != 2 for piece in x):
        raise ValueError(
            f"crops have shapes {[tuple(piece.shape) for piece in x]}: expected all to be one (B, "
            "K)."
        )
    if len(x) == 1:
        return x[0][None]
    # by what _Join knows nothing of
    transformed = (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )
    return torch.stack(tuple(x)) if transformed or not _lie_side_by_side(x) else _Join.apply(*x)


def _lie_side_by_side(pieces: Sequence[Tensor]) -> bool:
    """Whether they are plain tensors of one memory, each as far behind the one before, and
    alike."""
    if any(
        type(x) not in (Tensor, torch.nn.Parameter) or x.is_neg() or x._is_zerotensor()
        for x in pieces
    ):
        return False
    first, apart = pieces[0], pieces[1].storage_offset() - pieces[0].storage_offset()
    return apart > 0 and all(
        x.untyped_storage()._cdata == first.untyped_storage()._cdata
        and x.dtype == first.dtype
        and x.stride() == first.stride()
        and x.storage_offset() == first.storage_offset() + i * apart
        for i, x in enumerate(pieces)
    )


class _Join(torch.autograd.Function):
    """The stack of pieces that lie side by side, without a copy; each gets its own gradient,
    whatever it is then used for.

    Copied, the loss as DINOv2 calls it takes 1.28 times as long with 32 images, 1.23 times with 8
    (benchmarks/paths.py, one thread of an AMD EPYC, 2026-11-27).
    """

    @staticmethod
    def forward(ctx: Any, *pieces: Tensor) -> Tensor:
        apart = pieces[1].storage_offset() - pieces[0].storage_offset()
        return (
            pieces[0]
            .detach()
            .as_strided((len(pieces), *pieces[0].shape), (apart, *pieces[0].stride()))
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind(0)
