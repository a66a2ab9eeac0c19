"""Which implementation of an operation runs: what there is, what is missing, what was asked for."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from .. import _C as _core
except ImportError as error:  # no compiler when the package was installed
    _C: Any = None
    NO_CPP = (
        f"the C++ core dinofast._C does not load ({error}); install again on a machine with "
        "a C++17 compiler"
    )
else:
    _C, NO_CPP = _core, ""
# imported when used
NO_TRITON = (
    "" if importlib.util.find_spec("triton") else "Triton is not installed; pip install triton"
)


class Operation(NamedTuple):
    """kernels: device type -> the kind of kernel that is faster than the reference there. file: its
    name in kernels/FILE.py, tests/ops/test_FILE.py, the ahead-of-time check and the launches under
    the sanitizer. core: its C++, csrc/cpu/CORE.cpp. has_reference: False where Pillow is the
    specification."""

    kernels: Mapping[str, str]
    file: str
    core: str | None = None
    has_reference: bool = True


_BOTH = {"cpu": "cpp", "cuda": "triton"}
OPERATIONS = {
    "dino_loss": Operation(_BOTH, "dino_loss", "dino_loss"),
    "soft_cross_entropy": Operation(_BOTH, "dino_loss", "dino_loss"),
    "adamw_ema_": Operation(_BOTH, "adamw_ema", "adamw_ema"),
    "ema_": Operation(_BOTH, "adamw_ema", "adamw_ema"),
    "grad_norms": Operation(_BOTH, "adamw_ema", "adamw_ema"),
    "color": Operation(_BOTH, "color", "multicrop", has_reference=False),
    "normalize": Operation({"cuda": "triton"}, "normalize"),
}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = (None, "reference", "cpp", "triton")

library = torch.library.Library("dinofast", "DEF")


def paths() -> dict[str, dict[str, str]]:
    """Operation -> device type ("cpu", "cuda") -> the implementation it takes there and why not a
    faster one."""

    def path(operation: Operation, device: str) -> str:
        kernel = operation.kernels.get(device)
        reason = unavailable_reason(kernel) if kernel else "no kernel for this device"
        if kernel and reason is None:
            return kernel
        return f"{'reference (plain torch)' if operation.has_reference else 'none'}: {reason}"

    return {
        name: {device: path(operation, device) for device in ("cpu", "cuda")}
        for name, operation in OPERATIONS.items()
    }


def check_required() -> None:
    """Raise `ValueError` when DINOFAST_REQUIRE names a kind of kernel that is unknown or cannot run
    here."""
    for kind in filter(None, os.environ.get("DINOFAST_REQUIRE", "").split(",")):
        if kind not in IMPLS[2:]:
            raise ValueError(
                f"DINOFAST_REQUIRE names '{kind}': this version knows {', '.join(IMPLS[2:])}."
            )
        if reason := unavailable_reason(kind):
            raise ValueError(f"DINOFAST_REQUIRE names {kind}, but {reason}.")


def unavailable_reason(kernel: str) -> str | None:
    """Why this kind of kernel cannot run here."""
    return {"cpp": NO_CPP, "triton": NO_TRITON}[kernel] or None


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, thousands of times slower: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(op: str, impl: str | None, *tensors: Tensor) -> str:
    device = tensors[0].device.type
    kernel = OPERATIONS[op].kernels.get(device)
    takes_dtypes, asked = all(t.dtype in KERNEL_DTYPES for t in tensors), impl is not None
    if not OPERATIONS[op].has_reference and (impl := impl or kernel) in (None, "reference"):
        raise ValueError(
            f"dinofast.{op} has no plain torch version: give CPU or CUDA tensors, and leave impl "
            "out."
        )
    if impl is None:
        if kernel is None or not takes_dtypes:
            return "reference"
        if reason := unavailable_reason(kernel):
            if kernel in os.environ.get("DINOFAST_REQUIRE", "").split(","):
                raise RuntimeError(f"DINOFAST_REQUIRE names {kernel}, but {reason}.")
            if not torch.compiler.is_compiling():  # which cannot trace a warning
                warnings.warn(
                    f"dinofast.{op} runs in plain torch, many times slower: {reason}.", stacklevel=1
                )
            return "reference"
        return kernel
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}: use one of {', '.join(map(repr, IMPLS))}.")
    if impl == "reference":
        return impl
    if impl != kernel and not (
        impl == "triton" == OPERATIONS[op].kernels.get("cuda") and device == "cpu" and interpreted()
    ):
        raise ValueError(
            f"impl={impl!r} has no {op} for {device} tensors: leave impl out to take the best "
            "there is."
        )
    if not takes_dtypes:
        raise ValueError(
            f"impl={impl!r} takes float32, bfloat16 and float16, not "
            f"{[str(t.dtype) for t in tensors]}: use impl='reference'."
        )
    if reason := unavailable_reason(impl):
        raise RuntimeError(
            f"impl={impl!r} was asked for, but {reason}."
            if asked
            else f"dinofast.{op} has no kernel here, nor a plain torch version: {reason}."
        )
    return impl


def is_known(number: float | Tensor) -> bool:
    """Whether its value can be looked at without waiting for a device; not while being traced."""
    return not isinstance(number, Tensor) or (
        type(number) is Tensor and number.device.type == "cpu" and not torch.compiler.is_compiling()
    )


def on_device(device: torch.device, number: Tensor) -> Tensor:
    """A tensor of one number on the device; one on the host is sent without waiting."""
    return (
        number
        if number.device == device
        else torch.full((), number.item(), dtype=number.dtype, device=device)
    )
