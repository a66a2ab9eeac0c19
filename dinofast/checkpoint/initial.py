"""Where a run begins that does not begin at random: weights of ours, of the official code, of timm,
torchvision, Hugging Face or DINOv2, in freshly built parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.dino import Model
from ..nn.packing import resampling
from ..nn.vit import VisionTransformer
from ..runtime.words import counted
from .foreign import REGISTERS, Weights, check_config, from_hugging_face, without_layer_scale
from .reading import read
from .weights import (
    PATCHES,
    VIT_OF_WIDTH,
    below,
    check_fit,
    in_folder,
    inside,
    mapping_of,
    name_foreign,
    shape_in,
    unwrapped,
    weights_in,
    weights_under,
    without_head,
)

SHOWN = 4  # weights that a sentence lists
_WAY_OUT = (
    "choose an `arch` of timm that has, or train with a backbone of your own in Python, "
    "dinofast.train(cfg, backbone=...)"
)


@torch.no_grad()
def initialize(model: Model, path: str | Path, key: str = "teacher") -> list[str]:
    """Load a file's weights into student and teacher of a fresh model, for continued pretraining.

    path: what `load_backbone` takes, a ViT of DINOv2 or Hugging Face for our ViTs too, and weights
    of torchvision and timm for their models. Learned positions of another grid are resampled as in
    the official code. The head and the center come along from a training checkpoint of the same
    sizes. key: "teacher" or "student", or another name under which the file holds weights.

    Returns sentences to be logged: what was loaded, what was changed, what was left out. Raises
    `ValueError` for weights that do not fit, naming those that differ.
    """
    path = in_folder(Path(path))
    state = read(path)
    backbone = model.student.backbone
    weights, changes = _for_backbone(path, state, key, backbone)
    for each in (backbone, model.teacher.backbone):
        each.load_state_dict(weights)
    loaded = f"student and teacher begin with {counted(len(weights), 'weight')} of '{path}'"
    return [loaded, *changes, _head(path, state, key, model)]


def _for_backbone(
    path: Path, state: Mapping[str, Any], key: str, backbone: nn.Module
) -> tuple[Weights, list[str]]:
    """Weights by the backbone's own names and shapes, and what was done to make them so."""
    weights, is_backbone = weights_in(path, state, key)
    wanted = backbone.state_dict()
    is_vit = isinstance(backbone, VisionTransformer)
    if is_vit:
        weights = from_hugging_face(weights)
    whole = weights
    if not is_backbone:
        weights = below(path, weights, tuple(wanted), key)
    changes = []
    if isinstance(backbone, VisionTransformer):
        weights, scaled = without_layer_scale(weights)
        changes += ["its layer scales are multiplied into the weights they follow"] * scaled
        weights, told = _without_registers(weights)
        changes += told
    weights, beside = without_head(weights, wanted)
    if beside:
        changes.append(f"left out, no part of a backbone: {_some(beside)}")
    if isinstance(backbone, VisionTransformer):
        changes += _resample(weights, backbone)
    if weights.keys() != wanted.keys():
        name_foreign(path, whole if is_vit else weights, wanted, _WAY_OUT)
    _check_shapes(path, weights, wanted, is_vit)
    if isinstance(backbone, VisionTransformer):
        changes += check_config(path, backbone)
    for name in check_fit(path, backbone, weights, "backbone", ""):
        raise ValueError(f"'{path}' holds numbers that are not finite, in '{name}': name another.")
    return weights, changes


def _without_registers(weights: Weights) -> tuple[Weights, list[str]]:
    found = [name for name in REGISTERS if name in weights]
    if not found:
        return weights, []
    kept = mapping_of(weights)
    for name in found:
        del kept[name]
    return kept, [
        f"its registers ({found[0]}) are left out: features differ until training has made up for "
        "that"
    ]


def _resample(weights: Weights, vit: VisionTransformer) -> list[str]:
    """Put positions (1, 1 + side side, D) for this ViT's grid in the place of those for another."""
    table = weights.get("pos_embed")
    if not isinstance(table, Tensor) or table.ndim != 3 or table.shape[2] != vit.embed_dim:
        return []
    side = math.isqrt(max(table.shape[1] - 1, 0))
    if side == vit.grid or not side or side * side != table.shape[1] - 1:
        return []
    matrix = resampling(side, vit.grid, vit.grid, torch.device("cpu"))
    table = table.float()
    weights["pos_embed"] = torch.cat((table[:, :1], matrix @ table[:, 1:]), dim=1)
    return [
        f"its positions of {side} x {side} patches are resampled to {vit.grid} x {vit.grid}, "
        "bicubically"
    ]


def _check_shapes(
    path: Path, weights: Mapping[str, Any], wanted: Mapping[str, Any], is_vit: bool
) -> None:
    """Raise `ValueError` with all that differs, and of a ViT with what it is."""
    told = _differences(weights, wanted)
    if not told:
        return
    patches, way_out = weights.get(PATCHES), "name weights of this `arch`"
    if is_vit and isinstance(patches, Tensor) and patches.ndim == 4:
        width, _, patch, _ = patches.shape
        arch = VIT_OF_WIDTH.get(width)
        what = f"`arch` {arch}" if arch else f"a ViT of width {width}, which is none of ours,"
        way_out = f"these are of {what} with `patch_size` {patch}"
    raise ValueError(f"'{path}' does not fit this backbone: {_some(told)}: {way_out}.")


def _some(told: list[str]) -> str:
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return f"{', '.join(told[:SHOWN])}{more}"


def _differences(weights: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys((*wanted, *weights))
    pairs = {name: (shape_in(weights, name), shape_in(wanted, name)) for name in names}
    return [
        f"'{name}' is {there} in the file and {here} here"
        for name, (there, here) in pairs.items()
        if there != here and here != "not made yet"
    ]


def _head(path: Path, state: Mapping[str, Any], key: str, model: Model) -> str:
    """Load the head too, and the center of its outputs, where a file has such; in a sentence."""
    held = unwrapped(weights_under(path, state, key)) if key in state else mapping_of({})
    weights = inside(held, "head.")
    if not weights:
        return "it has no projection head for DINO: the head begins at random"
    head = model.student.head
    if told := _differences(weights, head.state_dict()):
        return f"its projection head is another, {told[0]}: the head begins at random"
    check_fit(path, head, weights, "head", "")
    norms, fixed = "last_layer.weight_g", ""
    frozen = [n for n, p in head.named_parameters() if n == norms and not p.requires_grad]
    if frozen and not bool((weights[norms] == 1).all()):
        weights[norms] = torch.ones_like(weights[norms])
        fixed = ", the norms of its last layer held at 1 (`norm_last_layer`)"
    for each in (head, model.teacher.head):
        each.load_state_dict(weights)
    center = state.get("dino_loss")
    center = center.get("center") if isinstance(center, Mapping) else None
    ours = model.dino_loss.center
    if isinstance(center, Tensor) and center.shape == ours.shape and center.isfinite().all():
        ours.copy_(center)
        return f"its projection head and center are loaded, too{fixed}"
    return f"its projection head is loaded, too{fixed}; the center begins at 0"
