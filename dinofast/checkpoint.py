"""Checkpoints in the official layout: written atomically, read without running anything that is
inside."""

from __future__ import annotations

import argparse
import fcntl
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from torch import Tensor, nn

from . import __version__
from .config import OLD_NAMES, VITS, Config
from .nn import vit
from .nn.backbones import UnknownArch, build_backbone
from .nn.dino import Model

# What official files hold besides tensors and plain containers: the parsed arguments and float64
# learning rates.
_SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    scalar,
    (scalar, "numpy.core.multiarray.scalar"),
]
_VIT_OF_WIDTH = {64: "vit_nano", 192: "vit_tiny", 384: "vit_small", 768: "vit_base"}


@dataclass
class TrainState:
    """Where a run stands: `step` optimizer steps are done. The sums make the epoch's log line exact
    after a resume."""

    step: int = 0
    epoch: int = 0
    images_in_epoch: int = 0
    n_images: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""  # of the images, empty when unknown
    global_batch: int = 0

    def check(self) -> None:
        """Raise `ValueError` for what no save of ours holds."""
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not type(getattr(TrainState(), f.name)) or (
                isinstance(value, int) and value < 0
            ):
                raise ValueError(f"its position in the run says {f.name}={value!r}")


def save(
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    cfg: Config,
    position: TrainState,
) -> None:
    """Write the official keys (`student` named `module.*`, `teacher`, `optimizer`, `epoch` = the
    next one, `args`, `dino_loss`, `fp16_scaler` where used) and one more, `dinofast`, through a
    temporary file in the same folder and a rename."""
    state = {
        "student": {f"module.{name}": value for name, value in model.student.state_dict().items()},
        "teacher": model.teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": position.epoch,
        "args": cfg.to_dict(),
        "dino_loss": model.dino_loss.state_dict(),
        "dinofast": {"version": __version__, **asdict(position)},
    }
    if scaler is not None:
        state["fp16_scaler"] = scaler.state_dict()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a file would only fill a full disk
        raise
    _sync_folder(path)


def link(path: Path, name: Path) -> None:
    """A second name for the checkpoint just written: a hard link where the file system has them,
    else a copy."""
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)
    _sync_folder(name)


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Make the folder, see that it can be written, and keep other runs out of it. Raises
    `ValueError` now, not after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"`output_dir` '{folder}' cannot be written ({error.strerror}): choose another."
        ) from error
    with lock:
        try:
            # of this process alone: it ends with it, however it ends
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"another run is writing to `output_dir` '{folder}': wait for it, or choose "
                "another."
            ) from error
        except OSError:
            pass  # a file system without locks: nothing can be known there
        yield


def _sync_folder(path: Path) -> None:
    """The rename itself must survive a power cut."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. Only tensors, containers, numbers and the official
    arguments are admitted.

    Raises `ValueError` for a file that is missing, truncated, or no checkpoint; the file is left as
    it is.
    """
    if not path.is_file():
        raise ValueError(
            f"'{path}' is a folder, not a checkpoint: move it away, or choose another file or "
            "`output_dir`."
            if path.is_dir()
            else f"there is no checkpoint at '{path}'."
        )
    try:
        with torch.serialization.safe_globals(_SAFE):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # what does not belong there makes the unpickler raise all kinds
        reason = (
            "it is empty"
            if not path.stat().st_size
            else error.strerror
            if isinstance(error, OSError) and error.strerror
            else "it holds something other than tensors, numbers and text"
            if isinstance(error, pickle.UnpicklingError)
            else "it is truncated, damaged, or something else"
        )
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint, {reason}: it was left as it is; move it "
            "away, or choose another file or `output_dir`."
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(
            f"'{path}' holds a {type(state).__name__}, not a checkpoint: it was left as it is."
        )
    return dict(state)


def load_backbone(
    path: str | Path,
    key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    backbone: nn.Module | None = None,
) -> nn.Module:
    """The backbone of a checkpoint, in eval mode on the CPU: images (B, 3, h, w) -> features (B,
    D).

    path: a training checkpoint of ours or of the official code, or a bare state dict of a backbone.
    key: "teacher" or "student". arch, patch_size: only needed when the file does not tell.
    backbone: a module of your own that takes the weights, and returns what it returns:
    `nn.features.features` pools that to (B, D). Raises `ValueError` when the weights do not fit.
    """
    path = Path(path)
    state = read(path)
    saved = arguments_in(state)
    if key in state:
        state = state[key]
    elif "teacher" in state or "student" in state:
        raise ValueError(
            f"'{path}' has no '{key}': choose from "
            f"{', '.join(k for k in ('teacher', 'student') if k in state)}."
        )
    weights = strip_prefix(state, "module.")
    if any(name.startswith("backbone.") for name in weights):
        weights = {
            name.removeprefix("backbone."): value
            for name, value in weights.items()
            if name.startswith("backbone.")
        }
    arch = arch or saved.get("arch") or ""
    arch = OLD_NAMES.get(arch, arch)
    if backbone is not None:
        pass  # what its weights must be is checked below
    elif "patch_embed.proj.weight" in weights and "pos_embed" in weights and arch in (*VITS, ""):
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        arch = arch or _VIT_OF_WIDTH.get(width, "")
        if arch not in VITS:
            raise ValueError(
                f"'{path}' does not tell its architecture (width {width}): name it with `arch`."
            )
        side = round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch
        backbone = getattr(vit, arch)(patch_size=patch, img_size=(side,))
    else:
        if not arch:
            raise ValueError(f"'{path}' does not tell its architecture: name it with `arch`.")
        options = Config(arch=arch, patch_size=patch_size or saved.get("patch_size", 16))
        try:
            backbone = build_backbone(options, 0.0, weights)
        except UnknownArch as error:
            raise ValueError(
                f"'{path}' holds a backbone `arch` {arch}, which is no name that can be built "
                f"here.{error.hint} One of your own is loaded in Python, "
                "load_backbone(path, backbone=...), and evaluated there, "
                "dinofast.evaluate.knn.knn(path, data_path, backbone=...)."
            ) from error
    check_fit(path, backbone, weights, "backbone", saved)
    backbone.load_state_dict(weights)
    return backbone.eval()


def arguments(path: str | Path) -> dict[str, Any]:
    """The options that a checkpoint was trained with; empty when it does not tell."""
    return arguments_in(read(Path(path)))


def strip_prefix(state: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(state, Mapping):
        raise ValueError(
            f"there is a {type(state).__name__} where the weights should be: this is no DINO "
            "checkpoint."
        )
    return {name.removeprefix(prefix): value for name, value in state.items()}


def arguments_in(state: Mapping[str, Any]) -> dict[str, Any]:
    args = state.get("args", {})
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    return dict(args) if isinstance(args, Mapping) else {}


def check_fit(
    path: Path, module: nn.Module, weights: Mapping[str, Any], what: str, saved: Mapping[str, Any]
) -> None:
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {
        name: tuple(value.shape)
        for name, value in strip_prefix(weights, "").items()
        if isinstance(value, Tensor)
    }
    broken = [
        name
        for name, value in weights.items()
        if isinstance(value, Tensor) and not torch.isfinite(value).all()
    ]
    if broken:
        raise ValueError(
            f"'{path}' holds numbers that are not finite, in '{broken[0]}' of the {what}: it was "
            "left as it is; go back to an earlier checkpoint."
        )
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            origin = "".join(
                f", saved with `{k}` {saved[k]}"
                for k in ("arch", "patch_size", "out_dim")
                if k in saved
            )
            raise ValueError(
                f"'{path}' does not fit this {what}: '{name}' is {given.get(name, 'absent')} in "
                f"the file and {wanted.get(name, 'absent')} here{origin}. Use the options it was "
                "saved with, or another `output_dir`."
            )
