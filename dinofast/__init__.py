"""dinofast: DINO pretraining (arXiv 2104.14294), exactly as published and fast.

Names are loaded when they are first used, so that importing the package costs nothing and touches
no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "loss": ("DINOLoss",),
    "optim": ("AdamWEMA", "SGDEMA", "LARSEMA", "param_groups"),
    "ops": ("dino_loss", "soft_cross_entropy", "ema_"),
    "nn.vit": ("VisionTransformer", "vit_tiny", "vit_small", "vit_base", "vit_nano"),
    "nn.head": ("DINOHead",),
    "nn.dino": ("Model", "MultiCropWrapper"),
    "config": ("Config",),
    "checkpoint": ("load_backbone",),
    "train": ("train",),
    "run_folder": ("RunFolder",),
    "callbacks": ("Callback",),
    "evaluate.knn": ("knn",),
    "evaluate.linear.protocols": ("linear",),
    "evaluate.embedding.embed": ("embed",),
    "evaluate.retrieval.neighbors": ("retrieve",),
    "evaluate.segmentation.images": ("segment",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:
    from .callbacks import Callback as Callback
    from .checkpoint import load_backbone as load_backbone
    from .config import Config as Config
    from .evaluate.embedding.embed import embed as embed
    from .evaluate.knn import knn as knn
    from .evaluate.linear.protocols import linear as linear
    from .evaluate.retrieval.neighbors import retrieve as retrieve
    from .evaluate.segmentation.images import segment as segment
    from .loss import DINOLoss as DINOLoss
    from .nn.dino import Model as Model
    from .nn.dino import MultiCropWrapper as MultiCropWrapper
    from .nn.head import DINOHead as DINOHead
    from .nn.vit import VisionTransformer as VisionTransformer
    from .nn.vit import vit_base as vit_base
    from .nn.vit import vit_nano as vit_nano
    from .nn.vit import vit_small as vit_small
    from .nn.vit import vit_tiny as vit_tiny
    from .ops import dino_loss as dino_loss
    from .ops import ema_ as ema_
    from .ops import soft_cross_entropy as soft_cross_entropy
    from .optim import LARSEMA as LARSEMA
    from .optim import SGDEMA as SGDEMA
    from .optim import AdamWEMA as AdamWEMA
    from .optim import param_groups as param_groups
    from .run_folder import RunFolder as RunFolder
    from .train import train as train


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dinofast' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    if name not in _MODULES:  # `dinofast.train` is a module too, which can be called
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
