"""Which implementation of an operation runs: what there is, what is missing, what was asked for."""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as error:  # no compiler when the package was installed
    _C, NO_CPP = None, f"the C++ core dinofast._C does not load ({error}); install again on a machine with a C++17 compiler"
else:
    NO_CPP = ""
NO_TRITON = "" if importlib.util.find_spec("triton") else "Triton is not installed; pip install triton"  # imported when used

KERNELS = {  # operation -> device type -> the implementation that is faster than the reference
    "dino_loss": {"cpu": "cpp", "cuda": "triton"},
    "soft_cross_entropy": {"cpu": "cpp", "cuda": "triton"},
    "adamw_ema_": {"cpu": "cpp", "cuda": "triton"},
    "ema_": {"cpu": "cpp", "cuda": "triton"},
    "grad_norms": {"cpu": "cpp", "cuda": "triton"},
    "colour": {"cpu": "cpp", "cuda": "triton"},
    "normalize": {"cuda": "triton"},
}
NO_REFERENCE = ("colour",)  # whose specification is Pillow; the pil backend computes with that itself
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = (None, "reference", "cpp", "triton")

library = torch.library.Library("dinofast", "DEF")


def paths() -> dict[str, dict[str, str]]:
    """Operation -> device type ("cpu", "cuda") -> the implementation it takes there and why not a faster one."""
    def path(op: str, kernel: str | None) -> str:
        reason = missing(kernel) if kernel else "no kernel for this device"
        return f"{'none' if op in NO_REFERENCE else 'reference (plain torch)'}: {reason}" if reason else kernel
    return {op: {device: path(op, kernels.get(device)) for device in ("cpu", "cuda")} for op, kernels in KERNELS.items()}


def check_required() -> None:
    """Raise `ValueError` when DINOFAST_REQUIRE names a kind of kernel that is unknown or cannot run here."""
    for kind in filter(None, os.environ.get("DINOFAST_REQUIRE", "").split(",")):
        if kind not in IMPLS[2:]:
            raise ValueError(f"DINOFAST_REQUIRE names '{kind}': this version knows {', '.join(IMPLS[2:])}.")
        if reason := missing(kind):
            raise ValueError(f"DINOFAST_REQUIRE names {kind}, but {reason}.")


def missing(kernel: str) -> str:
    """Why this kind of kernel cannot run here; empty if it can."""
    return {"cpp": NO_CPP, "triton": NO_TRITON}[kernel]


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, thousands of times slower: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(op: str, impl: str | None, *tensors: Tensor) -> str:
    device = tensors[0].device.type
    kernel = KERNELS[op].get(device)
    takes_dtypes = all(t.dtype in KERNEL_DTYPES for t in tensors)
    if op in NO_REFERENCE and (impl := impl or kernel) in (None, "reference"):
        raise ValueError(f"dinofast.{op} has no plain torch version: give CPU or CUDA tensors, and leave impl out.")
    if impl is None:
        if kernel is None or not takes_dtypes:
            return "reference"
        if reason := missing(kernel):
            if kernel in os.environ.get("DINOFAST_REQUIRE", "").split(","):
                raise RuntimeError(f"DINOFAST_REQUIRE names {kernel}, but {reason}.")
            if not torch.compiler.is_compiling():  # which cannot trace a warning
                warnings.warn(f"dinofast.{op} runs in plain torch, many times slower: {reason}.", stacklevel=1)
            return "reference"
        return kernel
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}: use one of {', '.join(map(repr, IMPLS))}.")
    if impl == "reference":
        return impl
    if impl != kernel and not (impl == "triton" == KERNELS[op].get("cuda") and device == "cpu" and interpreted()):
        raise ValueError(f"impl={impl!r} has no {op} for {device} tensors: leave impl out to take the best there is.")
    if not takes_dtypes:
        raise ValueError(f"impl={impl!r} takes float32, bfloat16 and float16, not {[str(t.dtype) for t in tensors]}: "
                         "use impl='reference'.")
    if reason := missing(impl):
        raise RuntimeError(f"impl={impl!r} was asked for, but {reason}.")
    return impl


def is_known(number: float | Tensor) -> bool:
    """Whether its value can be looked at without waiting for a device; not while being traced."""
    return not isinstance(number, Tensor) or (
        type(number) is Tensor and number.device.type == "cpu" and not torch.compiler.is_compiling())


def on_device(device: torch.device, number: Tensor) -> Tensor:
    """A tensor of one number on the device; one on the host is sent without waiting."""
    return number if number.device == device else torch.full((), number.item(), dtype=number.dtype, device=device)
