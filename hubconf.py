"""The ViTs through torch.hub, which lists what can be called here:
torch.hub.load(PATH, "vit_small", source="local", pretrained=FILE)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

dependencies = ["torch", "numpy"]


def load(
    checkpoint: str | Path,
    key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
):
    """The backbone of a checkpoint, of a run's folder, or of another file of weights, in eval mode.

    See `dinofast.load_backbone`.
    """
    from dinofast import load_backbone

    return load_backbone(checkpoint, key, arch, patch_size)


def vit_tiny(pretrained: str | Path | None = None, **options: Any):
    """ViT-Ti: images (B, 3, h, w) -> (B, 192).

    pretrained: a file of its weights, None for random ones. options: of `dinofast.vit_tiny`, as
    patch_size and img_size; those that a file tells are not needed with it.
    """
    return _vit("vit_tiny", pretrained, options)


def vit_small(pretrained: str | Path | None = None, **options: Any):
    """ViT-S: images (B, 3, h, w) -> (B, 384); see `vit_tiny`."""
    return _vit("vit_small", pretrained, options)


def vit_base(pretrained: str | Path | None = None, **options: Any):
    """ViT-B: images (B, 3, h, w) -> (B, 768); see `vit_tiny`."""
    return _vit("vit_base", pretrained, options)


def vit_nano(pretrained: str | Path | None = None, **options: Any):
    """Two layers, for demos: images (B, 3, h, w) -> (B, 64); see `vit_tiny`."""
    return _vit("vit_nano", pretrained, options)


def _vit(arch: str, pretrained: str | Path | None, options: dict[str, Any]):
    import dinofast

    if pretrained is None or pretrained is False:
        return getattr(dinofast, arch)(**options)
    if pretrained is True:
        raise ValueError(
            "dinofast publishes no weights: give a checkpoint, pretrained='checkpoint.pth'."
        )
    key = options.pop("key", "teacher")
    if not options.keys() - {"patch_size"}:
        return load(pretrained, key, arch, options.get("patch_size"))
    return dinofast.load_backbone(pretrained, key, backbone=getattr(dinofast, arch)(**options))
