"""What a step measures, summed over an epoch on the device; and what the sums say of the
training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

COUNTS = ("good_steps", "steps")


class EpochSums:
    """Running sums of the metrics over an epoch, on the device: adding to them never waits. saved:
    what `read` gave."""

    def __init__(self, device: torch.device, saved: Mapping[str, float] | None = None) -> None:
        self._device, self._values = device, dict(saved or {})
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """metrics: by name, each () on the device; of a step with one that is not finite only the
        step is counted."""
        if self._sums is None:
            self._names = (*metrics, *COUNTS)
            if set(self._values) != set(self._names):  # of a run that measured other things
                self._values = {}
            values = [self._values.get(name, 0.0) for name in self._names]
            self._sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        now = torch.stack([value.double() for value in metrics.values()])
        good = torch.isfinite(now).all()
        self._sums[:-1] += torch.where(good, torch.cat((now, good.double()[None])), 0.0)
        self._sums[-1] += 1

    def read(self) -> dict[str, float]:
        """The sum of each metric, and COUNTS; waits for the device."""
        if self._sums is not None:
            self._values = dict(zip(self._names, self._sums.tolist(), strict=True))
        return dict.fromkeys(COUNTS, 0.0) | self._values

    def clear(self) -> None:
        self._values = {}
        if self._sums is not None:
            self._sums.zero_()


def collapse_warning(loss: float, teacher_entropy: float, log_k: float) -> str | None:
    """A sentence when the teacher says nothing (every prototype alike) or always the same (one
    prototype for all images)."""
    if log_k == 0:
        return None
    if loss > 0.99 * log_k and teacher_entropy > 0.99 * log_k:
        return (
            f"the loss {loss:.3f} sits at log K = {log_k:.3f}: teacher and student have collapsed "
            "to a uniform output. If it stays, lower `teacher_temp` and `warmup_teacher_temp` "
            "(0.03), lower `out_dim` for small data, raise `lr` or its batch."
        )
    if teacher_entropy < 0.01 * log_k:
        return (
            f"the teacher's entropy {teacher_entropy:.4f} is near 0: it gives one prototype to "
            "nearly everything. If it stays, raise `teacher_temp`, raise `momentum_teacher`, or "
            "lower `lr`."
        )
    return None
