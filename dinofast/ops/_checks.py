"""What the optimizers' operations refuse, in words."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ._choice import is_known


def check_one_number(value: Any, name: str) -> None:
    """Raise ValueError for anything but a number or a tensor of one number."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of {value.numel()} numbers: give one number, and a group of "
                "its own to parameters that need another."
            )
    elif not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}: give a number.")


def check_momentum(momentum: float | Tensor | None, name: str = "momentum") -> None:
    """Raise ValueError for a teacher's momentum that is known and no share; None is none yet."""
    if momentum is None or (type(momentum) is float and 0.0 <= momentum <= 1.0):
        return
    check_one_number(momentum, name)
    if is_known(momentum) and not 0 <= momentum <= 1:
        raise ValueError(f"{name} is {float(momentum)}: it must lie between 0 and 1.")


def check_for_reference(op: str, tensors: Sequence[Tensor]) -> None:
    """What plain torch would only say in its own words."""
    if len(devices := {x.device for x in tensors}) > 1:
        raise ValueError(
            f"{op} got tensors on {' and '.join(sorted(map(str, devices)))}: move student, teacher "
            "and optimizer state to one device."
        )
    for dtype in {x.dtype for x in tensors}:
        wide = dtype.is_floating_point and dtype.itemsize > 1
        if not wide and not (op == "ema_" and dtype.is_complex):
            way_out = (
                "give torch.view_as_real of it"
                if dtype.is_complex
                else "such numbers have no average; leave the tensor out"
            )
            raise ValueError(f"{op} got a tensor of {dtype}: {way_out}.")


def check_lists(
    first_name: str, first: Sequence[Tensor], **others: Sequence[Tensor | None]
) -> None:
    """Equal lengths, and equal shapes in every row."""
    shapes = [x.shape for x in first]
    for name, tensors in others.items():
        if len(tensors) != len(first):
            raise ValueError(
                f"{name} has {len(tensors)} tensors and {first_name} has {len(first)}: give as "
                "many."
            )
        for i, (x, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if x is not None and x.shape != shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(x.shape)}: expected {tuple(shape)}, that of "
                    f"{first_name}[{i}]."
                )


def check_steps(n: int, steps: Sequence[Tensor], coefficients: Tensor) -> None:
    if len(steps) != n or any(step.ndim for step in steps) or coefficients.shape != (n,):
        raise ValueError(
            f"steps has shapes {[tuple(s.shape) for s in steps]} and coefficients "
            f"{tuple(coefficients.shape)}: expected {n} tensors () and one ({n},), to go with "
            "params."
        )
