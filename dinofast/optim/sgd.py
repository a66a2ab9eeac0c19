"""SGD and LARS with clipping and the teacher's average, in plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from .base import StudentTeacherOptimizer


class SGDEMA(StudentTeacherOptimizer):
    """SGD with momentum, clipping and the teacher's average; state as `torch.optim.SGD`'s."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        clip_grad: float = 0.0,
        clip_mode: str = "tensor",
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=0,
            weight_decay=weight_decay,
            nesterov=False,
            maximize=False,
            foreach=None,
            differentiable=False,
            fused=None,
        )
        super().__init__(params, defaults, student, teacher, clip_grad, clip_mode)

    _buffer = "momentum_buffer"

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
            if self._buffer not in state:
                state[self._buffer] = torch.zeros_like(p)
            self._apply(group, p, grad * coefficient, state[self._buffer], skip)
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
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
        )


class LARSEMA(SGDEMA):
    """LARS as the official code has it, with clipping and the teacher's average."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        *,
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
            weight_decay_filter=None,
            lars_adaptation_filter=None,
        )
        StudentTeacherOptimizer.__init__(
            self, params, defaults, student, teacher, clip_grad, clip_mode
        )

    _buffer = "mu"

    def _apply(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, buffer: Tensor, skip: Tensor
    ) -> None:
        reference.lars_(
            p,
            grad,
            buffer,
            skip,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            eta=group["eta"],
        )
