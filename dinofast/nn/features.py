"""Features of any backbone, one row an image: the rule by which what it returns is pooled.

Training, `feature_width`, k-NN and whatever reads features use this one rule:

| what `forward` returns | features (B, D) |
|---|---|
| (B, D) | as they are |
| a map (B, C, h, w) | its mean over h and w |
| tokens (B, N, D) | the first one if the backbone has a class token, else their mean |
| a dict or an object of named outputs | the first of `NAMES` that it has, else its only tensor |
| a tuple | its first element, unless it is a pyramid of maps |
| a list | its only element |

What fits no row is refused with a ValueError that says what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.words import a_kind

# of Hugging Face, of DINOv2 (forward_features), of Hugging Face without a pooler, of others
NAMES = ("pooler_output", "x_norm_clstoken", "last_hidden_state", "features")
_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding", "cls_embedding"}


def features(backbone: nn.Module, images: Tensor) -> Tensor:
    """images (B, 3, h, w) -> (B, D) by the rule above. Raises `ValueError` for what it does not
    cover."""
    return pooled(backbone(images), backbone)


def pooled(output: Any, backbone: nn.Module, what: str = "the backbone") -> Tensor:
    """What `backbone` has returned -> (B, D). what: how messages call it."""
    x = _tensor_of(output)
    if x is not None and x.is_floating_point() and _is_dense(x):
        if x.ndim == 2:
            return x
        if x.ndim == 4:
            return x.mean((2, 3))
        if x.ndim == 3:
            return x[:, 0] if _has_class_token(backbone) else x.mean(1)
    raise ValueError(
        f"{what} returns {_told(output)}: expected features (B, D), a map (B, C, h, w) or "
        f"tokens (B, N, D), in real numbers, or these as {', '.join(NAMES)}; "
        "let its forward return one of them."
    )


def _is_dense(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


def _tensor_of(output: Any) -> Tensor | None:
    """The one tensor that stands for all of an output, None where nothing says which it is."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list | tuple):
        maps = [x for x in output if isinstance(x, Tensor) and x.ndim == 4]
        clear = len(output) == 1 or (isinstance(output, tuple) and output and len(maps) < 2)
        return _tensor_of(output[0]) if clear else None
    named = (
        dict(output)
        if isinstance(output, Mapping)
        else {name: getattr(output, name, None) for name in NAMES}
    )
    named = {name: value for name, value in named.items() if value is not None}
    for name in NAMES:
        if name in named:
            return _tensor_of(named[name])
    return _tensor_of(next(iter(named.values()))) if len(named) == 1 else None


def _has_class_token(backbone: nn.Module) -> bool:
    return any(
        name.rpartition(".")[2] in _CLASS_TOKENS
        for name, _ in (*backbone.named_parameters(), *backbone.named_buffers())
    )


def _told(output: Any) -> str:
    if isinstance(output, Tensor):
        kind = "" if _is_dense(output) else "nested " if output.is_nested else "sparse "
        shape = "" if output.is_nested else f" of shape {tuple(output.shape)}"
        return f"{kind}{str(output.dtype).removeprefix('torch.')}{shape}"
    if isinstance(output, Mapping):
        inside = ", ".join(f"{name} {_short(value)}" for name, value in output.items())
        return f"a {type(output).__name__} with {inside or 'nothing in it'}"
    if isinstance(output, list | tuple):
        inside = ", ".join(map(_short, output))
        return f"a {type(output).__name__} of {inside or 'nothing'}"
    return a_kind(output)


def _short(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
