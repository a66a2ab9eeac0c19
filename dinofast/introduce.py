"""What a run says before its first step: of the data, of the model, of what does the work, how long
it will take at least, and which options do not go with so many images."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy
import PIL
import torch

from . import __version__, ops
from .config import Config
from .data import Loader
from .nn.flops import flops_of, peak_flops
from .nn.vit import VisionTransformer
from .runtime.distributed import Process
from .runtime.metrics import SMALL_DATA
from .runtime.progress import Run, in_words
from .runtime.words import counted
from .step import Step

_NAMES = {
    "cpp": "C++",
    "triton": "Triton",
    "native": "C++",
    "pil": "Pillow",
    "dali": "DALI",
    "own": "worker processes",
}


def introduce(
    run: Run, cfg: Config, process: Process, step: Step, loader: Loader, start: int
) -> None:
    """start: the step at which the run goes on."""
    parameters = sum(p.numel() for p in step.model.student.parameters())
    patches = f" with patches of {cfg.patch_size} x {cfg.patch_size}" if cfg.vit else ""
    processes = f", {counted(process.world, 'process', 'processes')}" if process.world > 1 else ""
    warmup = f"after {counted(cfg.warmup, 'epoch')} of warm-up" if cfg.warmup else "from the start"
    for line in (
        f"model: {cfg.arch}{patches}, {parameters / 1e6:.2f} M parameters with its head",
        f"device: {process.device_name}, {step.precision}{processes}; {_engine(process, loader)}",
        f"data: {counted(loader.n_images, 'image')}; {counted(run.images_per_step, 'image')} a "
        f"step, {counted(loader.steps_per_epoch, 'step')} an epoch",
        *loader.remarks(),
        f"network: {step.how}",
        f"learning rate: {step.schedule.peak_lr:.3g} {warmup} (`lr` {cfg.lr:g} x "
        f"{run.images_per_step} / 256 images)",
    ):
        run.log(line)
    steps = cfg.epochs * loader.steps_per_epoch - start
    if process.is_main and steps > 0:
        epochs = f"to the end of epoch {cfg.epochs - 1}" if start else counted(cfg.epochs, "epoch")
        run.log(
            f"to do: {epochs}, {counted(steps, 'step')}; {_duration(cfg, process, step, steps)}"
        )


def environment(process: Process) -> dict[str, str]:
    """What a run runs on, for its record."""
    processes = counted(process.world, "process", "processes")
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": f"{process.device_name}, {processes}",
        "dinofast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "system": platform.platform(),
    }


def _engine(process: Process, loader: Loader) -> str:
    """What makes the crops and the loss, and why not something faster."""
    loss, _, reason = ops.paths()["dino_loss"][process.device.type].partition(": ")
    loss, crops = _NAMES.get(loss, "torch"), _NAMES.get(loader.backend, loader.backend)
    if loss == crops and not loader.backend_note:
        return f"crops and loss by {crops}"
    why = [f" ({note})" if note else "" for note in (loader.backend_note, reason)]
    return f"crops by {crops}{why[0]}, loss by {loss}{why[1]}"


def _duration(cfg: Config, process: Process, step: Step, steps: int) -> str:
    """By the matrix products of the network and how fast the device does such: never more than the
    truth."""
    images, backbone = steps * cfg.batch_size_per_gpu * cfg.accumulate, step.model.student.backbone
    least_s = 0.0
    if isinstance(backbone, VisionTransformer):
        peak, _ = peak_flops(process.device, step.dtype, quick=True)
        least_s = images * flops_of(cfg, backbone) / peak
    if least_s < 1:
        return "how long that takes is told after the first step"
    return f"at least {in_words(least_s)}, at this device's full speed"


def advice(cfg: Config, n_images: int) -> list[str]:
    """Sentences about options that do not go with the length of the run or with so many images."""
    said = []
    if cfg.warmup != cfg.warmup_epochs:
        said.append(
            f"`warmup_epochs` {cfg.warmup_epochs}, the default, is longer than `epochs` "
            f"{cfg.epochs}: shortened to {cfg.warmup}; give another value to choose"
        )
    halves = [name for name in ("train", "val", "test") if Path(cfg.data_path, name).is_dir()]
    if halves[:1] == ["train"] and len(halves) > 1:
        said.append(
            f"`data_path` has {' and '.join(f'{name}/' for name in halves)}, and all images below "
            f"it are used: give '{Path(cfg.data_path, 'train')}' to leave the others out"
        )
    if cfg.out_dim > max(n_images, 1024):  # less is no worse than the advice
        said.append(
            f"`out_dim` {cfg.out_dim:,} is more prototypes than there are images ({n_images:,}): "
            f"most will stand for none, and the loss may stay near log K; try {SMALL_DATA}"
        )
    return said
