"""How exact a kernel must be: no worse than eager PyTorch, within a factor."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(
    ours: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, terms: float = 0.0
) -> None:
    """Assert that the error of `ours` against `exact` (float64) is at most `factor` times that of
    `eager` (dtype of `ours`).

    Both the largest and the root mean square error count. As eager may be exact by luck, one
    float32 rounding is granted on top: of the value, and once of `terms`, the size of the terms
    whose difference the value is.
    """
    assert ours.dtype == eager.dtype and ours.shape == eager.shape == exact.shape, (
        "only like can be compared with like"
    )
    assert torch.isfinite(ours).all(), "not finite"
    ours_off, eager_off, values = ours.double() - exact, eager.double() - exact, exact.double()
    granted = torch.finfo(torch.float32).eps
    for name, size, extra in (
        ("largest", _largest, terms),
        ("root mean square", _rms, terms / ours.numel() ** 0.5),
    ):
        limit = factor * size(eager_off) + granted * (size(values) + extra)
        assert size(ours_off) <= limit, (
            f"{name} error {size(ours_off):.3g}, above {limit:.3g}; eager's is "
            f"{size(eager_off):.3g}, the values' size {size(values):.3g}"
        )


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
