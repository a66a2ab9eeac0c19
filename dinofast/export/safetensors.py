"""One .safetensors file: the bare backbone with the official names, and in its metadata what
`load_backbone` and the evaluations need to know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..checkpoint import load_backbone
from ..checkpoint.kinds import is_safetensors
from ..checkpoint.reading import METADATA
from ..nn.features import features
from .files import write_weights
from .source import Source

SUFFIX, FILES, NEEDS = ".safetensors", (), ("safetensors",)
ANY_SIZE = True


def check(source: Source) -> None:
    """All backbones are taken."""


def is_kind(path: Path) -> bool:
    return is_safetensors(path)


def write(source: Source, path: Path) -> None:
    options = {
        "arch": source.arch,
        "global_crops_size": source.side,
        "image_mean": source.mean,
        "image_std": source.std,
        "value_range": source.value_range,
        "exif": source.exif,
    }
    if source.vit:
        options["patch_size"] = source.patch
    write_weights(path, source.module.state_dict(), {METADATA: json.dumps(options)})


def load(path: Path) -> Callable[[Tensor], Tensor]:
    backbone = load_backbone(path)
    return lambda images: features(backbone, images)


def usage(path: Path) -> list[str]:
    load_it = f"load it: backbone = dinofast.load_backbone({str(path)!r})"
    return [load_it, "features: backbone(images)"]
