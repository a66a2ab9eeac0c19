"""A run's folder, read: its options, its metrics, its weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from . import config_file
from .checkpoint import load_backbone
from .runtime.json_lines import JsonLines

_FILES = (config_file.NAME, "checkpoint.pth", "log.txt")  # of a run, at least one of them


class RunFolder(os.PathLike[str]):
    """What `train` returns; of an earlier run `RunFolder("runs/mine")`. Files are read when they
    are first asked for.

    path: of the folder; as a path it stands for checkpoint.pth. backbone: what made a backbone of
    your own. Raises `ValueError` if there is no such folder.
    """

    def __init__(self, path: str | Path, backbone: Callable[[], nn.Module] | None = None) -> None:
        self.path, self._make = Path(path), backbone
        if not any((self.path / name).exists() for name in _FILES):
            raise ValueError(f"there is no run in '{path}': name the `output_dir` of one.")

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def checkpoint(self) -> Path:
        """The last one, from which the run goes on."""
        return self.path / "checkpoint.pth"

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best score, None where none was taken."""
        path = self.path / "best.pth"
        return path if path.exists() else None

    @cached_property
    def teacher(self) -> nn.Module:
        """The teacher's backbone of the last checkpoint, in eval mode on the CPU: images (B, 3, h,
        w) -> features (B, D)."""
        return load_backbone(self.checkpoint, backbone=self._make() if self._make else None)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Of the run, by name, also those of other versions; empty where config.yaml is missing."""
        return config_file.options_in(self.path)

    @cached_property
    def changes(self) -> list[dict[str, Any]]:
        """Of options when the run went on: step, option, from, to."""
        return config_file.changes_in(self.path)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What the run last ran on: versions, device, processes."""
        return config_file.environment_in(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """A dict an epoch, from log.txt: `epoch`, `train_loss`, `train_teacher_entropy`,
        `eval_knn`, ..."""
        return JsonLines(self.path / "log.txt", "epoch").read()

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """A dict for every `log_steps` steps, from metrics.jsonl: `step`, `loss`, `lr`,
        `images_per_s`, ..."""
        lines = JsonLines(self.path / "metrics.jsonl", "step").read()
        return [line for line in lines if "loss" in line]
