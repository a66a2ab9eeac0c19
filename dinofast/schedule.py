"""What changes from step to step: learning rate, weight decay, teacher momentum, teacher
temperature."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import Config


def cosine(
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    start: float = 0.0,
) -> np.ndarray:
    """One float64 value per step: a linear warm-up from `start` to `base`, both included, then half
    a cosine to `final`."""
    warmup_steps = warmup_epochs * steps_per_epoch
    rest = epochs * steps_per_epoch - warmup_steps
    falling = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate((np.linspace(start, base, warmup_steps), falling))


def teacher_temps(warmup_temp: float, temp: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """One float64 value per epoch: linear from `warmup_temp` to `temp` over the warm-up epochs,
    then constant."""
    return np.concatenate(
        (np.linspace(warmup_temp, temp, warmup_epochs), np.full(epochs - warmup_epochs, temp))
    )


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """A seed of its own for every forward pass, so that a resumed run draws what an unbroken one
    draws."""
    digest = hashlib.blake2b(f"{seed} {step} {micro} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class StepValues:
    """The scalars of one step: float64 tensors () on the training device, so that reading them
    never waits for it."""

    lr: Tensor
    weight_decay: Tensor
    momentum: Tensor


class Schedule:
    """All tables of a run, one entry per optimizer step (temperatures: per epoch).

    `lr`, `weight_decay`, `momentum` are float64 arrays on the host; `at(step)` gives the same
    numbers on the device. peak_lr: the learning rate after its warm-up, scaled with the batch.
    """

    def __init__(
        self, cfg: Config, steps_per_epoch: int, world: int, device: torch.device | str = "cpu"
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.total = cfg.epochs * steps_per_epoch
        self.peak_lr = cfg.lr * cfg.batch_size_per_gpu * cfg.accumulate * world / 256
        self.lr = cosine(self.peak_lr, cfg.min_lr, cfg.epochs, steps_per_epoch, cfg.warmup)
        self.weight_decay = cosine(
            cfg.weight_decay, cfg.weight_decay_end, cfg.epochs, steps_per_epoch
        )
        self.momentum = cosine(cfg.momentum_teacher, 1.0, cfg.epochs, steps_per_epoch)
        temps = teacher_temps(
            cfg.warmup_teacher_temp, cfg.teacher_temp, cfg.warmup_teacher_temp_epochs, cfg.epochs
        )
        self._temps = temps.tolist()
        self.teacher_temp = torch.from_numpy(temps).float().to(device)
        self._tables = torch.from_numpy(np.stack((self.lr, self.weight_decay, self.momentum))).to(
            device
        )

    def at(self, step: int) -> StepValues:
        return StepValues(*self._tables[:, step].unbind(0))

    def read(self, step: int) -> dict[str, float]:
        """The values of a step by name, as numbers of the host."""
        tables = ("lr", "weight_decay", "momentum")
        temp = self._temps[step // self.steps_per_epoch]
        return {name: float(getattr(self, name)[step]) for name in tables} | {"teacher_temp": temp}
