"""One file of TorchScript, traced: it needs torch alone, and takes any number of images."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .source import Source, traceable

SUFFIX, FILES, NEEDS = ".torchscript.pt", (), ()
ANY_SIZE = True


def check(source: Source) -> None:
    """All backbones are taken."""


def is_kind(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def write(source: Source, path: Path) -> None:
    images = torch.randn(2, 3, source.side, source.side)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # newer torch calls the format old
        torch.jit.trace(traceable(source), images, check_trace=False).save(str(path))


def load(path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path))


def usage(path: Path) -> list[str]:
    return [f"load it: backbone = torch.jit.load({str(path)!r})", "features: backbone(images)"]
