"""dinofast: DINO pretraining (arXiv 2104.14294), exactly as published and fast.

Names are loaded when they are first used, so that importing the package costs nothing and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DINOLoss": "loss", "DINOHead": "head", "MultiCropWrapper": "model", "Model": "model", "VisionTransformer": "vit",
    "vit_tiny": "vit", "vit_small": "vit", "vit_base": "vit", "vit_nano": "vit", "AdamWEMA": "optim", "SGDEMA": "optim",
    "LARSEMA": "optim", "param_groups": "optim", "ema_": "ops", "dino_loss": "ops", "soft_cross_entropy": "ops",
    "Config": "config", "load_backbone": "checkpoint",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .checkpoint import load_backbone as load_backbone
    from .config import Config as Config
    from .head import DINOHead as DINOHead
    from .loss import DINOLoss as DINOLoss
    from .model import Model as Model
    from .model import MultiCropWrapper as MultiCropWrapper
    from .ops import dino_loss as dino_loss
    from .ops import ema_ as ema_
    from .ops import soft_cross_entropy as soft_cross_entropy
    from .optim import LARSEMA as LARSEMA
    from .optim import SGDEMA as SGDEMA
    from .optim import AdamWEMA as AdamWEMA
    from .optim import param_groups as param_groups
    from .vit import VisionTransformer as VisionTransformer
    from .vit import vit_base as vit_base
    from .vit import vit_nano as vit_nano
    from .vit import vit_small as vit_small
    from .vit import vit_tiny as vit_tiny


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dinofast' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
