"""SGD and LARS with clipping and the teacher's average, in plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from .base import StudentTeacherOptimizer
from .options import number
from .tensors import is_flat, is_sharded, local


class SGDEMA(StudentTeacherOptimizer):
    """SGD with momentum, clipping and the teacher's average; arguments in the order of
    `torch.optim.SGD`'s, with the official DINO's defaults, and state as its."""

    _kind = "SGDEMA"
    _buffer = "momentum_buffer"
    _moments: tuple[str, ...] = (_buffer,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        teacher_momentum: float | Tensor | None = None,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        clip_grad: float = 0.0,
        clip_mode: str = "tensor",
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            teacher_momentum=teacher_momentum,
        )
        super().__init__(params, defaults, student, teacher, clip_grad, clip_mode)

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        coefficients: Tensor,
        skip: Tensor,
        momentum: float | Tensor,
    ) -> None:
        for p, grad, coefficient in zip(params, grads, coefficients.unbind(0), strict=True):
            state = self.state[p]
            if state.get(self._buffer) is None:  # torch's own says None where momentum is 0
                state[self._buffer] = torch.zeros_like(p)
            self._apply(
                group, local(p), local(grad) * coefficient, local(state[self._buffer]), skip
            )
            if p in self.copies:
                self.copies[p].copy_(p)
        self._average(params, momentum, skip)

    def _apply(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, buffer: Tensor, skip: Tensor
    ) -> None:
        reference.sgd_(
            p,
            grad,
            buffer,
            skip,
            lr=number(group["lr"]),
            weight_decay=number(group["weight_decay"]),
            momentum=number(group["momentum"]),
        )


class LARSEMA(SGDEMA):
    """LARS as the official code has it, with clipping and the teacher's average."""

    _kind = "LARSEMA"
    _buffer = "mu"
    _moments = (_buffer,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0,
        *,  # the order differs from code to code
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0.0,
        eta: float = 0.001,
        maximize: bool = False,
        teacher_momentum: float | Tensor | None = None,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        clip_grad: float = 0.0,
        clip_mode: str = "tensor",
    ) -> None:
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            eta=eta,
            maximize=maximize,
            weight_decay_filter=None,
            lars_adaptation_filter=None,
            teacher_momentum=teacher_momentum,
        )
        StudentTeacherOptimizer.__init__(
            self, params, defaults, student, teacher, clip_grad, clip_mode
        )

    def _check_params(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        super()._check_params(params)
        if any(is_sharded(p) or is_flat(p) for p in params):
            raise ValueError(
                "LARSEMA needs the norms of whole parameters, and these are sharded: use AdamWEMA "
                "or SGDEMA with FSDP, or DistributedDataParallel."
            )

    def _apply(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, buffer: Tensor, skip: Tensor
    ) -> None:
        reference.lars_(
            p,
            grad,
            buffer,
            skip,
            lr=number(group["lr"]),
            weight_decay=number(group["weight_decay"]),
            momentum=number(group["momentum"]),
            eta=number(group["eta"]),
        )
