"""What a step measures, summed over an epoch on the device; and what the sums say of the training."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("loss", "teacher_entropy", "kl", "center_norm", "grad_norm")
N_SUMS = len(METRICS) + 2              # and the number of good steps, and of all steps


class EpochSums:
    """Running sums of the metrics over an epoch, on the device: adding to them never waits."""

    def __init__(self, device: torch.device, saved: list[float]) -> None:
        values = saved if len(saved) == N_SUMS else [0.0] * N_SUMS
        self._sums = torch.tensor(values, dtype=torch.float64, device=device)

    def add(self, metrics: Tensor) -> None:
        """metrics (5,), in the order of METRICS; of a step with a value that is not finite only the step is counted."""
        good = torch.isfinite(metrics).all()
        self._sums[:-1] += torch.where(good, torch.cat((metrics.double(), good.double()[None])), 0.0)
        self._sums[-1] += 1

    def read(self) -> list[float]:
        """The sums of the metrics, the number of good steps, the number of steps; waits for the device."""
        return self._sums.tolist()

    def clear(self) -> None:
        self._sums.zero_()


def collapse_warning(loss: float, teacher_entropy: float, log_k: float) -> str | None:
    """A sentence when the teacher says nothing (every prototype alike) or always the same (one prototype for all images)."""
    if log_k == 0:
        return None
    if loss > 0.99 * log_k and teacher_entropy > 0.99 * log_k:
        return (f"the loss {loss:.3f} sits at log K = {log_k:.3f}: teacher and student have collapsed to a uniform output. "
                "If it stays, lower `teacher_temp` and `warmup_teacher_temp` (0.03), lower `out_dim` for small data, "
                "raise `lr` or its batch.")
    if teacher_entropy < 0.01 * log_k:
        return (f"the teacher's entropy {teacher_entropy:.4f} is near 0: it gives one prototype to nearly everything. "
                "If it stays, raise `teacher_temp`, raise `momentum_teacher`, or lower `lr`.")
    return None
