"""Inputs of record and the yardstick for kernels: shared by tests and benchmarks, so that they cannot drift apart."""

from __future__ import annotations

import torch
from torch import Tensor

LOSS_KINDS = ("flat", "peaked", "huge")


def loss_inputs(kind: str, crops: int, images: int, prototypes: int, dtype: torch.dtype = torch.float32,
                seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded student (V, B, K) and teacher (2, B, K) logits in `dtype`, and a centre (K,) in float32.

    "flat": small noise, as at initialisation. "peaked": cosines around one prototype an image, as after training.
    "huge": up to +-10,000, where exponentials overflow unless the maximum is taken off first.
    """
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, images, prototypes, generator=generator) for n in (crops, 2))
    center = torch.randn(prototypes, generator=generator)
    if kind == "huge":
        student, teacher, center = (x.mul(3000).clamp(-1e4, 1e4) for x in (student, teacher, center))
    else:
        student, teacher, center = student * 0.2, teacher * 0.2, center * 0.05
        if kind == "peaked":
            favourite = torch.randint(prototypes, (1, images, 1), generator=generator)
            student.scatter_add_(2, favourite.expand(crops, -1, -1), torch.ones(crops, images, 1))
            teacher.scatter_add_(2, favourite.expand(2, -1, -1), torch.ones(2, images, 1))
        elif kind != "flat":
            raise ValueError(f"kind is {kind!r}: use one of {LOSS_KINDS}.")
    return student.to(dtype), teacher.to(dtype), center


def assert_no_worse(ours: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, terms: float = 0.0) -> None:
    """Assert that the error of `ours` against `exact` (float64) is at most `factor` times that of `eager` (dtype of `ours`).

    Both the largest and the root mean square error count. As eager may be exact by luck, one float32 rounding is granted
    on top: of the value, and once of `terms`, the size of the terms whose difference the value is.
    """
    assert ours.dtype == eager.dtype and ours.shape == eager.shape == exact.shape, "only like can be compared with like"
    assert torch.isfinite(ours).all(), "not finite"
    ours_off, eager_off, values = ours.double() - exact, eager.double() - exact, exact.double()
    granted = torch.finfo(torch.float32).eps
    for name, size, extra in (("largest", _largest, terms), ("root mean square", _rms, terms / ours.numel() ** 0.5)):
        limit = factor * size(eager_off) + granted * (size(values) + extra)
        assert size(ours_off) <= limit, (f"{name} error {size(ours_off):.3g}, above {limit:.3g}; eager's is "
                                         f"{size(eager_off):.3g}, the values' size {size(values):.3g}")


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
