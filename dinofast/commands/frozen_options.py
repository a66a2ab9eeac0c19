"""The options of every command that takes a trained backbone."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..config import option

WEIGHTS = (
    "A run's folder, or weights: of dinofast, the official code, timm, torchvision, or a ViT of "
    "Hugging Face or DINOv2."
)


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Of commands that take images at any size."""

    pretrained_weights: str = option(MISSING, WEIGHTS, metavar="FILE")
    checkpoint_key: str = option(
        "teacher",
        "Whose weights; untrained: the same network at random, to compare with.",
        choices=("teacher", "student", "untrained"),
    )
    arch: str | None = option(
        None,
        "Only where the checkpoint does not tell its architecture.",
        shown="from the checkpoint",
    )
    patch_size: int | None = option(
        None,
        "Side of a patch, likewise.",
        type=int,
        shown="from the checkpoint",
    )
    device: str | None = option(
        None, "Where features are computed.", choices=("cuda", "cpu"), shown="a GPU if there is one"
    )


@dataclass(frozen=True, kw_only=True)
class FrozenOptions(BackboneOptions):
    """Of commands that take center crops in batches."""

    resize: int | None = option(
        None, "Shorter side before the center crop, in pixels.", type=int, shown="8/7 of `crop`"
    )
    crop: int | None = option(
        None,
        "Side of the center crop, in pixels.",
        type=int,
        shown="the global crops' in training, 224 for official checkpoints",
    )
    batch_size_per_gpu: int = option(128, "Images at a time.")
    num_workers: int = option(10, "Processes that read images.", shown="10, at most one per core")


def of_backbone(options: BackboneOptions) -> dict[str, Any]:
    """What `evaluate.frozen.load_frozen` takes of them."""
    batches = ("batch_size_per_gpu", "num_workers")
    names = [f.name for f in fields(FrozenOptions) if f.name not in batches]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
