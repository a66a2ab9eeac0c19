"""Backbones by name from torchvision and timm, without their classifiers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

# where torchvision keeps the layers that make class scores
_CLASSIFIERS = ("fc", "head", "heads", "classifier")
# transformers of timm take crops of two sizes by one of these, where they do
TIMM_OPTIONS: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)


class Candidate(NamedTuple):
    """One way to build a name."""

    package: str
    build: Callable[[], nn.Module]


def candidates(arch: str, missing: list[str], channels: int = 3) -> Iterator[Candidate]:
    """All ways to build `arch` for images of so many channels, the first that fits to be taken:
    timm is only asked, and imported, where torchvision's does not fit. missing: gets the packages
    that cannot be imported, and why."""
    for package, find in {"torchvision.models": _from_torchvision, "timm": _from_timm}.items():
        try:
            library = importlib.import_module(package)
        except Exception as error:  # one that was built for another torch raises all kinds
            missing.append(f"{package} ({error})")
            continue
        for build in find(library, arch, channels):
            yield Candidate(package.partition(".")[0], build)


def _from_torchvision(library: Any, arch: str, channels: int) -> list[Callable[[], nn.Module]]:
    make = getattr(library, arch, None)
    # `get_model`, `list_models` and their like take no weights
    if not inspect.isfunction(make) or "weights" not in inspect.signature(make).parameters:
        return []
    if channels != 3:
        raise ValueError(
            f"`in_channels` {channels}: torchvision's {arch} takes 3; choose a vit_* of ours or a "
            "name of timm, or pass a backbone of your own."
        )
    auxiliary = arch in ("googlenet", "inception_v3")  # classifiers that need larger crops

    def build() -> nn.Module:
        options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
        model = make(weights=None, **options)
        _remove_classifier(model, arch)
        if type(model).__name__ in ("VisionTransformer", "MaxVit"):
            from .torchvision_sizes import any_size

            any_size(model)
        return model

    return [build]


def _remove_classifier(model: nn.Module, arch: str) -> None:
    """Take off the layer that makes class scores, and the dropout before it; what normalizes or
    pools for it stays."""
    name = next((n for n in _CLASSIFIERS if isinstance(getattr(model, n, None), nn.Module)), None)
    if name is None:
        raise ValueError(
            f"`arch` {arch}: this torchvision model has no classifier that could be taken off; "
            "pass it through the Python API, dinofast.train.train(cfg, backbone=...)."
        )
    head = getattr(model, name)
    layers = list(head.named_children()) if isinstance(head, nn.Sequential) else []
    last = max(
        (i for i, (_, m) in enumerate(layers) if isinstance(m, nn.Linear | nn.Conv2d)), default=None
    )
    if last is None:
        setattr(model, name, nn.Identity())
    else:
        setattr(head, layers[last][0], nn.Identity())
        if last and isinstance(layers[last - 1][1], nn.Dropout):
            setattr(head, layers[last - 1][0], nn.Identity())
    if isinstance(getattr(model, "dropout", None), nn.Dropout):
        model.dropout = nn.Identity()


def _from_timm(library: Any, arch: str, channels: int) -> list[Callable[[], nn.Module]]:
    if not library.is_model(arch):
        return []

    def builder(options: dict[str, Any]) -> Callable[[], nn.Module]:
        given = {"num_classes": 0, "in_chans": channels, **options}
        return lambda: library.create_model(arch, pretrained=False, **given)

    return [builder(options) for options in TIMM_OPTIONS]
