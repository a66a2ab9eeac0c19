"""Inputs of record, the same for benchmarks and tests."""

from __future__ import annotations

import torch
from torch import Tensor

LOSS_KINDS = ("flat", "peaked", "huge")


def loss_inputs(
    kind: str,
    crops: int,
    images: int,
    prototypes: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded student (V, B, K) and teacher (2, B, K) logits in `dtype`, and a center (K,) in
    float32.

    "flat": small noise, as at initialization. "peaked": cosines around one prototype an image, as
    after training. "huge": up to +-10,000, where exponentials overflow unless the maximum is taken
    off first.
    """
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, images, prototypes, generator=generator) for n in (crops, 2))
    center = torch.randn(prototypes, generator=generator)
    if kind == "huge":
        student, teacher, center = (
            x.mul(3000).clamp(-1e4, 1e4) for x in (student, teacher, center)
        )
    else:
        student, teacher, center = student * 0.2, teacher * 0.2, center * 0.05
        if kind == "peaked":
            favorite = torch.randint(prototypes, (1, images, 1), generator=generator)
            student.scatter_add_(2, favorite.expand(crops, -1, -1), torch.ones(crops, images, 1))
            teacher.scatter_add_(2, favorite.expand(2, -1, -1), torch.ones(2, images, 1))
        elif kind != "flat":
            raise ValueError(f"kind is {kind!r}: use one of {LOSS_KINDS}.")
    return student.to(dtype), teacher.to(dtype), center
