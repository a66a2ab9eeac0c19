"""What a step measures, summed over an epoch on the device; and what the sums say of the
training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

COUNTS = ("good_steps", "steps")

# Of log K. Of 36 runs of 14 epochs on three small data sets all 12 that end within 1 % of a uniform
# output are told, after 3 to 11 epochs; of the 15 that end with an entropy below 0.8 one is, for
# three epochs (benchmarks/results/small_data-cpu.json).
ONE_PROTOTYPE, UNIFORM = 0.01, 0.99
HIGH, WORSE, MUCH_WORSE, LITTLE, FALLING = 0.8, 0.02, 0.05, 0.1, 0.002
PATIENCE, ABOVE = 3, 2  # epochs


class EpochSums:
    """Running sums of the metrics over an epoch, on `device`: adding to them never waits. saved:
    what `read` gave."""

    def __init__(self, device: torch.device, saved: Mapping[str, float] | None = None) -> None:
        self.device, self._values = device, dict(saved or {})
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
            self._sums = torch.tensor(values, dtype=torch.float64, device=self.device)
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


# The one advice for thousands of images: of the settings measured on three small data sets with the
# usual lr, the one with the lowest entropy that keeps the accuracy (docs/training.md, 2026-11-27).
SMALL_DATA = "`out_dim` 1024 `momentum_teacher` 0.99 `teacher_temp` 0.02 `warmup_teacher_temp` 0.02"
# what helped against a collapse there, most first
WHAT_HELPS = (
    f"on small data take {SMALL_DATA}; then lower `lr` to a fifth; then take milder crops, "
    "`global_crops_scale` 0.5 1 and `local_crops_scale` 0.2 0.5; a higher `lr` does not help"
)


class Trend:
    """The mean losses of the epochs so far, which tell a collapse from a slow start.

    log_k: of the number of prototypes, what the loss of a uniform output is.
    """

    def __init__(self, log_k: float, losses: Sequence[float] = ()) -> None:
        self.log_k, self.losses, self._advised = log_k, list(losses), False

    def warning(self, loss: float, teacher_entropy: float) -> str | None:
        """After an epoch with these means, a sentence when training looks as if nothing were
        learned: the teacher is near uniform (every prototype alike) and it gets worse or does not
        get better, or it gives one prototype to nearly everything."""
        self.losses.append(loss)
        log_k, best = self.log_k, min(self.losses)
        if log_k == 0:
            return None
        if teacher_entropy < ONE_PROTOTYPE * log_k:
            return self._said(
                f"the teacher's entropy {teacher_entropy:.4f} is near 0: it gives one prototype to "
                "nearly everything",
                "raise `teacher_temp`, raise `momentum_teacher`, or lower `lr`",
            )
        uniform = min(loss, teacher_entropy) > UNIFORM * log_k
        above = self._stays_above()
        if not (uniform or above or self._gets_nowhere(loss, loss - teacher_entropy)):
            return None
        how = (
            f"sits at log K = {log_k:.3f}: teacher and student have collapsed to a uniform output"
            if uniform
            else f"does not fall and is above log K = {log_k:.3f}, that of a student which gives "
            "every prototype alike: nothing is learned"
            if above
            else f"is {loss / log_k:.0%} of log K = {log_k:.3f}, the best was {best:.3f}, and the "
            f"teacher's entropy is {teacher_entropy / log_k:.0%}: it is on its way to a uniform "
            "output"
        )
        return self._said(f"the loss {loss:.3f} {how}", WHAT_HELPS)

    def _said(self, what: str, cure: str) -> str:
        """With the advice the first time: once is enough."""
        again, self._advised = self._advised, True
        return f"{what}; for what helps see above" if again else f"{what}. If it stays, {cure}."

    def _stays_above(self) -> bool:
        """Above log K, which a student that has learned nothing has with any teacher, for ABOVE
        epochs and the one before, and no lower than then."""
        recent, log_k = self.losses[-ABOVE - 1 :], self.log_k
        above = len(recent) > ABOVE and min(recent) >= log_k
        return above and recent[-1] > recent[0] - FALLING * log_k

    def _gets_nowhere(self, loss: float, kl: float) -> bool:
        """High, above its best, not falling for PATIENCE epochs, and either far above its best, or
        above log K, or with a student that has hardly anything to learn from the teacher."""
        recent, log_k = self.losses[-PATIENCE - 1 :], self.log_k
        worse = loss - min(self.losses)
        return (
            len(recent) > PATIENCE
            and loss > HIGH * log_k
            and worse > WORSE * log_k
            and all(b > a - FALLING * log_k for a, b in zip(recent, recent[1:], strict=False))
            and (kl < LITTLE * log_k or worse > MUCH_WORSE * log_k or loss > log_k)
        )
