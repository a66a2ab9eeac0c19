"""What a parameter group may say: numbers within their range, and which of torch's options are
refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops

# Options of torch's optimizers that would change the result, by the value that changes nothing.
# `foreach`, `fused` and `capturable` choose one of torch's implementations: they are kept and mean
# nothing here.
_REFUSED: dict[str, Any] = {
    "amsgrad": False,
    "differentiable": False,
    "nesterov": False,
    "dampening": 0,
    "decoupled_weight_decay": True,
    "weight_decay_filter": None,
    "lars_adaptation_filter": None,
}
# what files of an older torch do not say
_ABSENT = {**_REFUSED, "maximize": False, "foreach": None, "fused": None, "capturable": False}
_NUMBERS = ("lr", "weight_decay", "eps", "momentum", "eta")


def check_group(group: Mapping[str, Any], kind: str, where: str = "") -> None:
    """Raise ValueError for a number out of its range, and for an option that `kind`, an optimizer's
    class, does not have. where: which group it is, in words. Keys that no optimizer knows, as
    schedulers add them, are left alone."""
    if torch.compiler.is_compiling():
        return
    for name in _NUMBERS:
        value = group.get(name, 0.0)
        if not (type(value) is float and 0.0 <= value < math.inf):
            _check_number(value, name + where)
    if "betas" in group:
        _check_betas(group["betas"], "betas" + where)
    ops.check_momentum(group.get("teacher_momentum"), "teacher_momentum" + where)
    for name, neutral in _REFUSED.items():
        value = group.get(name)
        if value is not None and value != neutral:
            raise ValueError(
                f"{name}{where} is {value}: {kind} does not have it; leave it out, or train with "
                "torch's optimizer and average the teacher with dinofast.ema_."
            )


def refuse_momentum(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for the momentum of a teacher that is not there."""
    for momentum in (group.get("teacher_momentum") for group in groups):
        if momentum is not None:
            raise ValueError(
                f"teacher_momentum is {momentum} but there is no teacher: give student and teacher "
                "too."
            )


def complete(
    group: dict[str, Any], defaults: Mapping[str, Any], kind: str, teacher_momentum: Any
) -> None:
    """Fill in what a loaded group does not say. Raises ValueError if that is what another kind of
    optimizer does not have."""
    for name in defaults:
        if name == "teacher_momentum":
            if group.get(name) is None:  # saved by torch, or where every step was told
                group[name] = teacher_momentum
        elif name not in group:
            if name not in _ABSENT:
                raise ValueError(
                    f"the state has no {name}: it is of another kind of optimizer than {kind}."
                )
            group[name] = _ABSENT[name]


def number(value: Any) -> Any:
    """A tensor of one number as (), whatever its shape."""
    return value.reshape(()) if isinstance(value, Tensor) and value.ndim else value


def _check_number(value: Any, name: str) -> None:
    ops.check_one_number(value, name)
    if ops.is_known(value) and not 0.0 <= value < math.inf:
        raise ValueError(
            f"{name} is {float(value)}: it must not be negative, and must be a finite number."
        )


def _check_betas(betas: Any, name: str) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{name} is {betas!r}: give two numbers, for example (0.9, 0.999).")
    for beta in betas:
        if type(beta) is float and 0.0 <= beta < 1.0:
            continue
        ops.check_one_number(beta, name)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} are {betas}: each must be at least 0 and below 1.")
