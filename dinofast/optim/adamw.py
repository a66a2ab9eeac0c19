"""AdamW with clipping and the teacher's average, in one kernel for all tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .base import StudentTeacherOptimizer
from .options import number
from .tensors import as_real


class AdamWEMA(StudentTeacherOptimizer):
    """AdamW with clipping and the teacher's average; state interchangeable with
    `torch.optim.AdamW`'s for float32 parameters.

    Of a 16-bit parameter the optimizer updates a float32 master (`state["master"]`, with moments in
    float32), made from its values at the first step, and the parameter is the master rounded: what
    is written into it from elsewhere is lost then.
    """

    _kind = "AdamWEMA"
    _moments = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
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
        wide, param_copies = self._masters([(p, p) for p in params], "master")
        teachers, teacher_copies = self._masters(
            [(p, self._teacher_of.get(p)) for p in params], "teacher_master"
        )
        states = [self.state[p] for p in params]
        for p, state in zip(wide, states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            else:  # a loaded state's counter is on the host, or a float in files of torch 1.11
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
        beta1, beta2 = map(float, group["betas"])
        lists = wide, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        wide, grads, exp_avgs, exp_avg_sqs, teachers, param_copies, teacher_copies = as_real(
            params, *lists, teachers, param_copies, teacher_copies
        )
        ops.adamw_ema_(
            wide,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [s["step"] for s in states],
            teachers,
            coefficients,
            skip,
            lr=number(group["lr"]),
            weight_decay=number(group["weight_decay"]),
            betas=(beta1, beta2),
            eps=float(group["eps"]),
            momentum=momentum,
            param_copies=param_copies,
            teacher_copies=teacher_copies,
        )
