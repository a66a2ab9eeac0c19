"""Files that several targets write: weights and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .source import Source

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file; each tensor in memory of its own."""
    from safetensors.torch import save

    own = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    path.write_bytes(save(own, metadata={"format": "pt", **metadata}))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def is_folder_of(path: Path, files: Sequence[str], key: str) -> bool:
    """Whether a folder holds these files alone, and a config.json with this key in it."""
    names = {file.name for file in path.iterdir()}
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8")) if names else {key: ""}
    except (OSError, ValueError):
        return False
    return names <= set(files) and isinstance(config, dict) and key in config


def need_vit(source: Source, target: str) -> None:
    """Raise `ValueError` for a backbone that is not one of our ViTs."""
    if source.vit is None:
        raise ValueError(
            f"`format` {target} takes dinofast's ViTs, and this is {source.arch}: `format` timm "
            "takes timm's models, in a folder that transformers.AutoModel loads too; onnx and "
            "torchscript take all."
        )
