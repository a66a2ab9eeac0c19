"""The DINO loss with the official signature, and the center."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .reference import center_update

Rows = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class LossStats:
    """Means over all ranks and micro-batches of one step, on the device, without gradient: each
    ()."""

    loss: Tensor
    teacher_entropy: Tensor

    @property
    def kl(self) -> Tensor:
        """Divergence from teacher to student: loss minus entropy, as every teacher row meets
        equally many student crops."""
        return self.loss - self.teacher_entropy


class DINOLoss(nn.Module):
    """Drop-in for the official `DINOLoss`: same constructor, methods, attributes and state (one
    buffer `center` (1, K), fp32). An `update_center` of a subclass is called as there: after the
    loss, without gradient, with the teacher's output.

    out_dim: prototypes K. ncrops: student crops V, the two global ones first. Temperatures of the
    teacher: linear from `warmup_teacher_temp` to `teacher_temp` over `warmup_teacher_temp_epochs`,
    then constant, up to `nepochs`.

    Beyond the official class: works without a process group, takes any float dtype (statistics are
    fp32), and a batch whose loss is not finite never reaches the center. Source: arXiv 2104.14294.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        out_dim = _whole(out_dim, "out_dim", 1)
        ncrops = _whole(
            ncrops, "ncrops", 2, " (the loss compares two global crops with all others)"
        )
        nepochs = _whole(nepochs, "nepochs", 0)
        warmup_teacher_temp_epochs = _whole(
            warmup_teacher_temp_epochs, "warmup_teacher_temp_epochs", 0
        )
        for name, temp in (
            ("warmup_teacher_temp", warmup_teacher_temp),
            ("teacher_temp", teacher_temp),
            ("student_temp", student_temp),
        ):
            ops.check_one_number(temp, name)
            if not 0 < temp < math.inf:
                raise ValueError(f"{name} is {temp}: it must be a number above 0.")
        ops.check_momentum(center_momentum, "center_momentum")
        if warmup_teacher_temp_epochs > nepochs:
            raise ValueError(
                f"warmup_teacher_temp_epochs is {warmup_teacher_temp_epochs} but nepochs is only "
                f"{nepochs}: the warm-up cannot be longer than the training."
            )
        self.ncrops = ncrops
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp_schedule = np.concatenate(
            (
                np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs),
                np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp, dtype=np.float64),
            )
        )
        self._pending: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._teacher_outputs: list[Tensor] = []  # for an `update_center` that is not ours

    def forward(self, student_output: Rows, teacher_output: Rows, epoch: int) -> Tensor:
        """student_output (ncrops B, K) and teacher_output (2 B, K), rows crop-major, or lists of
        the crops' parts of them; the loss (). Then updates the center.

        Raises `ValueError` for shapes that do not fit and for an epoch outside 0 .. nepochs - 1.
        """
        epoch = _whole(epoch, "epoch", None)
        if not 0 <= epoch < len(self.teacher_temp_schedule):
            raise ValueError(
                f"epoch is {epoch} but the loss was made for "
                f"nepochs={len(self.teacher_temp_schedule)}: epochs count from 0."
            )
        self._pending.clear()
        self._teacher_outputs.clear()
        temp = self.teacher_temp_schedule[epoch]
        temp = temp if isinstance(temp, Tensor) else float(temp)
        loss = self.accumulate(student_output, teacher_output, temp)
        self.center = self.center.clone()  # who holds the old one keeps it, as in the official code
        if self._overridden():
            self._pending.clear()
            self._call_update_center()
        else:
            self.step()
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output: Rows) -> None:
        """Move the center by the mean of teacher_output (n, K) over rows and ranks, unless a number
        is not finite."""
        teacher_output = _joined(teacher_output, "teacher_output")
        if teacher_output.ndim != 2 or teacher_output.shape[1] != self.center.shape[-1]:
            raise ValueError(
                f"teacher_output is {tuple(teacher_output.shape)}: expected (n, "
                f"{self.center.shape[-1]}), rows of out_dim numbers."
            )
        total = teacher_output.detach().sum(0, dtype=torch.float32) / len(teacher_output)
        self.center = self._moved(_mean_over_ranks(total))

    def _moved(self, batch_center: Tensor, finite: Tensor | None = None) -> Tensor:
        """The center after a step; batch_center (K,), finite (): whether to take it."""
        finite = torch.isfinite(batch_center).all() if finite is None else finite
        moved = center_update(self.center, batch_center, self.center_momentum)
        return torch.where(finite, moved.to(self.center.dtype), self.center)

    def _overridden(self) -> bool:
        """Whether somebody has put another `update_center` in, by a subclass or by hand."""
        return getattr(self.update_center, "__func__", None) is not _OURS

    @torch.no_grad()
    def _call_update_center(self) -> None:
        outputs = list(self._teacher_outputs)
        self._teacher_outputs.clear()
        self.update_center(outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def accumulate(
        self, student_output: Rows, teacher_output: Rows, teacher_temp: float | Tensor
    ) -> Tensor:
        """The loss () of one micro-batch; what the center needs of it is kept until `step`."""
        student_output = _joined(student_output, "student_output")
        teacher_output = _joined(teacher_output, "teacher_output")
        ops.check_one_number(teacher_temp, "teacher_temp")
        k = self.center.shape[-1]
        images, rest = divmod(teacher_output.shape[0], 2) if teacher_output.ndim == 2 else (0, 1)
        if (
            rest
            or not images
            or teacher_output.shape[1] != k
            or student_output.shape != (self.ncrops * images, k)
        ):
            raise ValueError(
                f"student_output {tuple(student_output.shape)} and teacher_output "
                f"{tuple(teacher_output.shape)} do not fit: expected ({self.ncrops} B, {k}) and (2 "
                f"B, {k}) for ncrops={self.ncrops} and out_dim={k}."
            )
        loss, entropy, teacher_sum = ops.dino_loss(
            student_output.unflatten(0, (self.ncrops, images)),
            teacher_output.detach().unflatten(0, (2, images)),
            self.center.flatten(),
            self.student_temp,
            teacher_temp,
        )
        self._pending.append((teacher_sum, loss.detach(), entropy, 2 * images))
        if self._overridden():
            self._teacher_outputs.append(teacher_output)
        return loss

    @torch.no_grad()
    def step(self) -> LossStats:
        """Average what was accumulated over micro-batches and ranks, and move the center unless a
        number is not finite.

        One all-reduce of K + 2 numbers, so that every rank comes to the same decision; no wait for
        the device.
        """
        if not self._pending:
            raise RuntimeError(
                "there is nothing to average: call forward or accumulate before step."
            )
        sums, losses, entropies, rows = zip(*self._pending, strict=True)
        self._pending.clear()
        means = torch.stack((*losses, *entropies)).view(2, -1).mean(1)
        total = torch.cat((torch.stack(sums).sum(0) / sum(rows), means)).float()
        total = _mean_over_ranks(total)
        stats = LossStats(loss=total[-2], teacher_entropy=total[-1])
        if self._teacher_outputs:
            self._call_update_center()
        else:
            self.center.copy_(self._moved(total[:-2], torch.isfinite(total).all()))
        return stats


_OURS = DINOLoss.update_center


def _whole(value: Any, name: str, least: int | None, why: str = "") -> int:
    """A number of any kind as an int. Raises ValueError for one that is not whole, or below
    `least`."""
    try:
        whole = int(value)
        fits = bool(whole == value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"{name} is {value!r}: give a whole number.")
    if least is not None and whole < least:
        raise ValueError(f"{name} is {whole}: give at least {least}{why}.")
    return whole


def _joined(rows: Any, name: str) -> Tensor:
    """A dense tensor of rows; of a list of such, one after the other."""
    if isinstance(rows, list | tuple) and rows and all(isinstance(x, Tensor) for x in rows):
        shapes = [tuple(x.shape) for x in rows]
        if len({shape[1:] for shape in shapes}) > 1 or () in shapes:
            raise ValueError(f"{name} is a list of {shapes}: all rows need the same length.")
        rows = torch.cat(list(rows))
    if not isinstance(rows, Tensor) or rows.layout is not torch.strided:
        what = f"of {rows.layout}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        raise ValueError(
            f"{name} is {what}: give a dense tensor (rows, out_dim), all of the first crop, then "
            "all of the next, or a list of one tensor a crop."
        )
    return rows


def _mean_over_ranks(total: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total
