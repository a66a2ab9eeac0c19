"""Linear layers `y = x W^T + b`, by the library that multiplies matrices fastest here.

torch gives fp32 products on a CPU to MKL, which takes a slower path on processors that are not
Intel's. oneDNN, which torch has for convolutions, does not, and a linear layer is a convolution of
one pixel: of ViT-S/16 with 8 images on two cores of an AMD EPYC, 211 to 223 GFLOP/s forward where
MKL has 156 to 195, for the gradients 200 to 223 where MKL has 174 to 198 (2026-11-25).
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..runtime.backends import select
from .weight_copies import operand

LIBRARIES = ("blas", "onednn")
WORTHWHILE = 2**29  # multiplications: with fewer, oneDNN gained nothing (measured on AMD)


class Linear(nn.Linear):
    """`nn.Linear` over packed rows, (T, D), by one of LIBRARIES."""

    library = "blas"
    reads_copies = True

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, operand(self, "weight"), operand(self, "bias"), self.library)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, library: str) -> Tensor:
    """x (T, D), weight (O, D), bias (O,) -> (T, O), as `F.linear`. What oneDNN is not for, or too
    little for it, BLAS does."""
    if (
        library == "onednn"
        and x.dim() == 2
        and x.shape[0] * weight.numel() >= WORTHWHILE
        and x.device.type == "cpu"
        and (
            x.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not _is_transformed()
        )
    ):
        return torch.ops.dinofast.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_transformed() -> bool:
    """Whether somebody wants more of torch than values and gradients: other derivatives, a trace,
    to see each operation."""
    if torch.compiler.is_compiling():
        # its function is true for any compiling in torch 2.11
        return torch.compiler._is_exporting_flag
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def select_library(requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies on this device: oneDNN for fp32 on CPUs where that is known to be faster,
    AMD's with AVX-512.

    Raises ValueError if the one that was asked for cannot.
    """
    reason = onednn_unavailable_reason(device, dtype)
    defaults = ("onednn", "blas") if reason is None and _mkl_is_slow() else ("blas",)
    return select("linear", requested, {"blas": None, "onednn": reason}, defaults).name


def onednn_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"it is for fp32 on a CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
    there = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    return None if there else "this torch is without it"


@lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    amd = "AuthenticAMD" in (_cpuinfo() or platform.processor())
    return (
        amd
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _cpuinfo() -> str:
    """The beginning of what Linux says of the first core."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return file.read(4096)
    except OSError:
        return ""


def _as_pixels(x: Tensor) -> Tensor:
    """(T, D) -> an image of one row with its channels last, (1, D, 1, T), without a copy."""
    return x.contiguous()[None, None].permute(0, 3, 1, 2)


def _as_rows(x: Tensor) -> Tensor:
    """And back, as a tensor of its own and not a view, which could not be changed in place."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.new_empty(0).set_(
        x.untyped_storage(), x.storage_offset(), (x.shape[3], x.shape[1]), (x.shape[1], 1)
    )


# ---- one opaque operator: a compiler would copy what it takes for images
@torch.library.custom_op("dinofast::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _as_rows(F.conv2d(_as_pixels(x), weight[:, :, None, None], bias))


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("dinofast::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.ops.aten.convolution_backward(
        _as_pixels(grad),
        _as_pixels(x),
        weight[:, :, None, None],
        [weight.shape[0]],
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [*wanted[:2], False],
    )
    return (
        _as_rows(grads[0]) if wanted[0] else grad.new_empty(0),
        grads[1].reshape(weight.shape) if wanted[1] else grad.new_empty(0),
        # oneDNN's is slower, and 14 times less exact
        grad.sum(0) if wanted[2] else grad.new_empty(0),
    )


@_linear_backward.register_fake
def _(grad, x, weight, wanted):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(
        grad.new_empty(shape if asked else 0) for shape, asked in zip(shapes, wanted, strict=True)
    )


def _keep(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    wanted, (x, weight) = list(ctx.needs_input_grad), ctx.saved_tensors
    if torch.is_grad_enabled():  # gradients of gradients are asked for
        grads = (grad @ weight, grad.t() @ x, grad.sum(0))
    else:
        grads = torch.ops.dinofast.linear_backward(grad, x, weight, wanted)
    return tuple(g if asked else None for g, asked in zip(grads, wanted, strict=True))


_linear.register_autograd(_backward, setup_context=_keep)
