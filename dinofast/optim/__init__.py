"""Optimizers that clip, update the student and average the teacher in one call: AdamW, SGD, LARS.

The whole step is decided on the device: a gradient that is not finite leaves parameters, moments
and teacher as they are, and nothing waits for the device to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .adamw import AdamWEMA
from .base import CLIP_MODES, StudentTeacherOptimizer
from .sgd import LARSEMA, SGDEMA

__all__ = [
    "CLIP_MODES",
    "OPTIMIZERS",
    "AdamWEMA",
    "LARSEMA",
    "SGDEMA",
    "StudentTeacherOptimizer",
    "param_groups",
]

OPTIMIZERS: dict[str, Callable[..., StudentTeacherOptimizer]] = {
    "adamw": AdamWEMA,
    "sgd": SGDEMA,
    "lars": LARSEMA,
}


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The official two groups: weights with decay, then biases and one-dimensional tensors without;
    frozen ones left out."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [name.endswith(".bias") or p.ndim == 1 for name, p in named]
    return [
        {"params": [p for (_, p), is_plain in zip(named, plain, strict=True) if not is_plain]},
        {
            "params": [p for (_, p), is_plain in zip(named, plain, strict=True) if is_plain],
            "weight_decay": 0.0,
        },
    ]
