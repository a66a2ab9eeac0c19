"""Weights of Hugging Face's ViTs and of DINOv2 under the names of our ViTs, for the same features.

Hugging Face's `ViTModel` and `Dinov2Model` differ in names alone, those of transformers 4 (which
files have) and 5 (which its modules have), and in three matrices where we have one. DINOv2 (arXiv
2304.07193) multiplies what a branch adds by a learned vector, which a linear layer can as well:
gamma (W a + b) = (diag(gamma) W) a + gamma b.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.vit import VisionTransformer

Weights = OrderedDict[str, Any]
_HF_PATCHES = "embeddings.patch_embeddings.projection.weight"
# theirs, of transformers 4 and 5, -> ours; the first that fits
_OURS = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
    (r"(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
)
_OURS_IN_BLOCK = (
    (r"(?:layernorm_before|norm1)\.", "norm1."),
    (r"(?:layernorm_after|norm2)\.", "norm2."),
    (r"attention\.(?:attention\.query|q_proj)\.", "attn.q."),
    (r"attention\.(?:attention\.key|k_proj)\.", "attn.k."),
    (r"attention\.(?:attention\.value|v_proj)\.", "attn.v."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
)
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}  # what a layer scale is multiplied into
REGISTERS = ("register_tokens", "reg_token")


def from_hugging_face(weights: Weights) -> Weights:
    """Those of a `ViTModel` or `Dinov2Model`, also below a prefix, with the names of our ViTs;
    others as they are."""
    ends = [name for name in weights if f".{name}".endswith(f".{_HF_PATCHES}")]
    if len(ends) != 1 or getattr(weights[ends[0]], "ndim", 0) != 4:
        return weights
    prefix = ends[0].removesuffix(_HF_PATCHES)
    named: Weights = OrderedDict()
    for name, value in weights.items():
        inside = name.startswith(prefix)
        named[_our_name(name.removeprefix(prefix)) if inside else name] = value
    for name in [n for n in named if n.endswith(".attn.q.weight")]:
        _join_qkv(named, name.removesuffix("q.weight"))
    return named


def _our_name(name: str) -> str:
    name = _replaced(name, _OURS)
    block = re.match(r"blocks\.\d+\.", name)
    return name if block is None else block[0] + _replaced(name[block.end() :], _OURS_IN_BLOCK)


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in table:
        if re.match(theirs, name):
            return re.sub(f"^{theirs}", ours, name)
    return name


def _join_qkv(weights: Weights, attn: str) -> None:
    """q, k and v (D, D) as one (3 D, D); a bias that is not there is 0."""
    if not all(isinstance(weights.get(f"{attn}{c}.weight"), Tensor) for c in "qkv"):
        return
    matrices = [weights.pop(f"{attn}{c}.weight") for c in "qkv"]
    zeros = [matrix.new_zeros(len(matrix)) for matrix in matrices]
    biases = [weights.pop(f"{attn}{c}.bias", zero) for c, zero in zip("qkv", zeros, strict=True)]
    weights[f"{attn}qkv.weight"] = torch.cat(matrices)
    weights[f"{attn}qkv.bias"] = torch.cat(biases)


def without_layer_scale(weights: Weights) -> tuple[Weights, bool]:
    """With what DINOv2 multiplies a branch by (`blocks.0.ls1.gamma`, (D,)) in the weights of its
    last layer, in float64; and whether there was any. Blocks in chunks, as its training saves them
    (`blocks.0.3.`), are numbered through."""
    numbered = OrderedDict(
        (re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name), value)
        for name, value in weights.items()
    )
    scales = [name for name in numbered if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]
    for name in scales:
        block, which = name.rsplit(".ls", 1)
        gamma = numbered.pop(name)
        for end in ("weight", "bias"):
            layer = f"{block}.{_SCALED[which[0]]}.{end}"
            if layer in numbered:
                value = numbered[layer]
                scaled = (value.double().t() * gamma.double()).t()
                numbered[layer] = scaled.to(value.dtype)
    return (numbered, True) if scales else (weights, False)


def check_config(path: Path, vit: VisionTransformer) -> list[str]:
    """Raise `ValueError` where weights would compute something else in our ViT, by the config.json
    of Hugging Face beside them; sentences about what hardly differs."""
    config = _json_beside(path, "config.json")
    config = config if "model_type" in config else {}
    heads = vit.embed_dim // vit.head_width
    theirs = config.get("num_attention_heads", heads)
    if theirs != heads:
        raise ValueError(
            f"'{path}' is a ViT with {theirs} heads by its config.json, and ours of this width has "
            f"{heads}: load it with transformers and pass the module, backbone=."
        )
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(
            f"'{path}' computes {activation} by its config.json, and our ViTs gelu: load it with "
            "transformers and pass the module, backbone=."
        )
    eps = config.get("layer_norm_eps", 1e-6)
    return [] if eps == 1e-6 else [f"its layer norms add {eps:g} to the variance, ours 1e-06"]


def preparation_beside(path: Path) -> dict[str, Any]:
    """How images are prepared for a file of transformers or timm, by the JSON in its folder, in the
    words of `Config`; empty where nothing tells."""
    config = _json_beside(path, "config.json")
    told = _json_beside(path, "preprocessor_config.json") if "model_type" in config else {}
    size = told.get("crop_size") or told.get("size") or {}
    side = size.get("height") if isinstance(size, dict) else size
    mean, std = told.get("image_mean"), told.get("image_std")
    if isinstance(of_timm := config.get("pretrained_cfg"), dict):
        mean, std = of_timm.get("mean"), of_timm.get("std")
        side = (of_timm.get("input_size") or [None])[-1]
    found = {"global_crops_size": side or config.get("image_size")}
    found |= {"image_mean": mean and tuple(mean), "image_std": std and tuple(std)}
    return {name: value for name, value in found.items() if value}


def _json_beside(path: Path, name: str) -> dict[str, Any]:
    """A file in the same folder; empty where it is not there, or something else."""
    try:
        found = json.loads((path.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
