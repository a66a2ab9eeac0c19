"""AdamW with clipping and the teacher's average, in one kernel for all tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .base import StudentTeacherOptimizer


class AdamWEMA(StudentTeacherOptimizer):
    """AdamW with clipping and the teacher's average; state interchangeable with
    `torch.optim.AdamW`'s for float32 parameters.

    Of a 16-bit parameter the optimizer updates a float32 master (`state["master"]`, with moments in
    float32), made from its values at the first step, and the parameter is the master rounded: what
    is written into it from elsewhere is lost then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        clip_grad: float = 0.0,
        clip_mode: str = "tensor",
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}: each must be at least 0 and below 1.")
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=False,
            maximize=False,
            foreach=None,
            capturable=False,
            differentiable=False,
            fused=None,
            decoupled_weight_decay=True,
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
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            else:  # a loaded state's counter is on the host, or a float in files of torch 1.11
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
        ops.adamw_ema_(
            wide,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
            teachers,
            coefficients,
            skip,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
            momentum=momentum,
            param_copies=param_copies,
            teacher_copies=teacher_copies,
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["state"] = {
            i: {**s, "step": s["step"].cpu()} if "step" in s else s
            for i, s in state["state"].items()
        }
        return state
