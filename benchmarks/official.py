"""The official DINO (facebookresearch/dino) as a rival: its semantics rewritten, and its own code from a checkout.

The checkout is the folder that $DINO_OFFICIAL names. One class or function of it is executed at a time, because importing its
scripts would ask for packages that a machine for benchmarks need not have.
"""

from __future__ import annotations

import ast
import atexit
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

NOT_SET = "DINO_OFFICIAL does not name a checkout of the official code"


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float,
              teacher_temp: float) -> tuple[Tensor, Tensor]:
    """The loss () and the sum of the teacher's rows (1, K), as the official `DINOLoss` gets them.

    student (V B, K), teacher (2 B, K), crop-major; center (1, K). A log-softmax for each of the 2 (V - 1) pairs; softmaxes in
    fp32 whatever the logits are, as under CUDA's autocast.
    """
    crops = student.shape[0] // (teacher.shape[0] // 2)
    student_chunks = (student / student_temp).chunk(crops)                                  # V of (B, K)
    q_chunks = F.softmax((teacher - center) / teacher_temp, dim=-1, dtype=torch.float32).detach().chunk(2)
    total, pairs = 0, 0
    for t, q in enumerate(q_chunks):                                                        # (B, K)
        for v, chunk in enumerate(student_chunks):
            if v != t:
                total = total + torch.sum(-q * F.log_softmax(chunk, dim=-1, dtype=torch.float32), dim=-1).mean()
                pairs += 1
    return total / pairs, torch.sum(teacher, dim=0, keepdim=True)


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Norm of each gradient tensor, read on the host; those above `clip` are scaled down, in place."""
    norms = []
    for p in model.parameters():
        if p.grad is not None:
            norm = p.grad.norm(2)
            norms.append(norm.item())
            factor = clip / (norm + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
    return norms


@torch.no_grad()
def average(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """The teacher's average, tensor by tensor."""
    for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
        t.mul_(momentum).add_((1 - momentum) * s.detach())


def has_checkout() -> bool:
    return bool(os.environ.get("DINO_OFFICIAL"))


def from_checkout(file: str, name: str, **more_names: Any) -> Any:
    """The class or function `name` of `file` in $DINO_OFFICIAL, which may use `more_names` beside torch's. Raises ValueError if
    it is not there."""
    path = Path(os.environ["DINO_OFFICIAL"]) / file
    if not path.is_file():
        raise ValueError(f"DINO_OFFICIAL is '{path.parent}' but has no {file}: name a checkout of facebookresearch/dino.")
    found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name]
    if not found:
        raise ValueError(f"'{path}' defines no {name}: DINO_OFFICIAL must name a checkout of facebookresearch/dino.")
    names = {"torch": torch, "nn": nn, "F": F, "np": np, "dist": dist, **more_names}
    exec(compile(ast.Module([found[-1]], []), str(path), "exec"), names)
    return names[name]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def checkout_dino_loss(crops: int, prototypes: int, student_temp: float, teacher_temp: float,
                       device: torch.device) -> nn.Module:
    """The checkout's own `DINOLoss`, with the process group of one process that its all-reduce asks for."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    loss = from_checkout("main_dino.py", "DINOLoss")
    return loss(prototypes, crops, teacher_temp, teacher_temp, 0, 1, student_temp=student_temp).to(device)
