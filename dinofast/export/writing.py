"""An export from beginning to end: what cannot be is told before the work, what was written is read
back and compared, and takes its name in one piece."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import read
from ..checkpoint.weights import in_folder
from ..runtime.terminal import printable, say
from ..runtime.words import one_line
from ..validation import check_output
from .source import Source, load_source

# by `format`: the file of the target, and what it writes, in words
TARGETS = {
    "timm": ("timm", "a folder of timm"),
    "hf": ("hf", "a folder of transformers"),
    "hf-dinov2": ("hf_dinov2", "a folder of transformers"),
    "onnx": ("onnx", "ONNX"),
    "safetensors": ("safetensors", ".safetensors"),
    "torchscript": ("torchscript", "TorchScript"),
}
# of the largest feature: fp32 in another order of sums differs by 1e-6, a wrong weight by 0.1
TOLERANCE = 1e-4
IMAGES = 3  # to compare with, another number than exporters see


def export(
    path: str | Path,
    format: str,
    output: str | Path | None = None,
    *,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    image_size: int | None = None,
    verify: bool = True,
) -> Path:
    """Write the backbone of `load_source` in one of the formats of `TARGETS`; where it lies.

    output: default beside the checkpoint, named like it. verify: load it with the program that it
    is for, where that is installed, and compare features. Raises `ValueError` for a backbone that
    the format cannot hold, a file that would be lost, and features that differ.
    """
    if format not in TARGETS:
        raise ValueError(f"`format` is '{format}': choose from {', '.join(TARGETS)}.")
    target = importlib.import_module(f".{TARGETS[format][0]}", __package__)
    _check_packages(format, target.NEEDS)
    checkpoint = in_folder(Path(path))
    if not checkpoint.is_file():
        read(checkpoint)  # tells why
    out = Path(output) if output else _beside(checkpoint, format, target, checkpoint_key)
    _check_place(out, checkpoint, format, target)
    source = load_source(path, checkpoint_key, arch, patch_size, image_size)
    target.check(source)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        said = _write(source, format, target, out, verify)
    say(f"the {checkpoint_key}'s {_name(source)} for images of {source.side} x {source.side}")
    say(f"written: {printable(str(out))}{said}")
    for line in target.usage(out):
        say(printable(line))
    say(source.preparation())
    return out


def _check_packages(format: str, needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`format` {format} needs {' and '.join(missing)}, not installed here: pip install "
            f"'dinofast[export]', or {' '.join(missing)} alone."
        )


def _beside(checkpoint: Path, format: str, target: Any, key: str) -> Path:
    whose = "" if key == "teacher" else f"-{key}"
    end = target.SUFFIX or f"-{format}"
    return checkpoint.with_name(f"{checkpoint.stem}{whose}{end}")


def _check_place(out: Path, checkpoint: Path, format: str, target: Any) -> None:
    """Raise `ValueError` if this cannot be written, or something else would be lost."""
    is_folder = not target.SUFFIX
    kind = (TARGETS[format][1], partial(target.is_kind, out))
    check_output("output", str(out), is_folder, is_replaced=True, kind=kind)
    parents = (checkpoint, *checkpoint.parents)
    if os.path.exists(out) and any(os.path.samefile(out, p) for p in parents if p.exists()):
        raise ValueError(f"`output` '{out}' is what is to be exported: name another.")


def _name(source: Source) -> str:
    return source.arch + (f" with patches of {source.patch} x {source.patch}" if source.vit else "")


def _write(source: Source, format: str, target: Any, out: Path, verify: bool) -> str:
    """Beside its place, then into it; what comparing has shown, in words."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    try:
        made = folder / out.name
        if not target.SUFFIX:
            made.mkdir()
        target.write(source, made)
        said = _compared(source, format, target, made) if verify else ", not compared"
        for file in [made] if made.is_file() else made.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        if out.is_dir():
            os.rename(out, folder / "old")
        os.replace(made, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return said


@torch.no_grad()
def _compared(source: Source, format: str, target: Any, made: Path) -> str:
    """Raise `ValueError` where what was written gives other features than the backbone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries say while they are imported
            run = target.load(made)
    except ImportError as error:
        return f", not compared: {one_line(error)}"
    sides = [(source.side, source.side)]
    if source.vit and target.ANY_SIZE:
        sides.append((source.side + source.patch, source.side))
    largest = 0.0
    for side in sides:
        images = torch.randn(IMAGES, 3, *side)
        difference, scale = _difference(run(images), source.features(images))
        if not difference <= TOLERANCE * max(scale, 1):
            raise ValueError(
                f"`format` {format} gives other features, by up to {difference:.2g} of "
                f"{scale:.2g}, for images of {side[0]} x {side[1]}; nothing was written. `verify` "
                "false writes it even so."
            )
        largest = max(largest, difference)
    at = " and ".join(f"{h} x {w}" for h, w in sides)
    return f", read back: its features differ by at most {largest:.1e} at {at}"


def _difference(given: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest feature."""
    if given.shape != wanted.shape:
        return float("inf"), float(wanted.abs().max())
    return float((given - wanted).abs().max()), float(wanted.abs().max())
