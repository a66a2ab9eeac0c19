"""The backbone in a file of weights: our checkpoints, official ones, and what other projects
save."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config import OLD_NAMES, VITS, Config
from ..nn import vit
from ..nn.backbones import UnknownArch, build_backbone
from ..runtime.words import a_kind, counted
from .foreign import (
    check_config,
    from_hugging_face,
    preparation_beside,
    without_layer_scale,
)
from .reading import arguments_in, read, with_attributes

VIT_OF_WIDTH = {64: "vit_nano", 192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
# where others keep the weights, and what they set before the names
_CONTAINERS = (
    *("state_dict", "state_dict_ema", "model_state_dict"),
    *("model", "model_ema", "net", "module", "ema"),
)
_WRAPPERS = ("module.", "_orig_mod.")
# beside a backbone: what makes class scores, MAE's decoder, what stands for a masked patch
_NOT_BACKBONE = re.compile(
    r"(head|heads|head_dist|fc|classifier|last_linear|pooler|decoder\w*)\.|decoder_"
    r"|(mask_token|masked_embed)$"
)
Weights = OrderedDict[str, Any]  # by name; with `_metadata` where it is known
PATCHES = "patch_embed.proj.weight"
# names that tell whose weights do not fit our ViTs
_FOREIGN = {
    r"(^|\.)(dist_token|head_dist\.)": "a distilled ViT (DeiT, with a second class token)",
    r"rope_embed\.|storage_tokens|embeddings\.patch_embeddings\.weight$": "DINOv3",
    r"(^|\.)(reg_token|register_tokens|registers?)$": "a ViT with registers",
    r"mlp\.(w12|weights_in)\.": "DINOv2 with SwiGLU",
    r"ls1\.gamma": "a ViT with layer scale",
    r"embeddings\.patch_embeddings\.|encoder\.layers?\.0\.attention\.": "a Hugging Face model",
    r"^visual\.|vision_model\.": "CLIP",
    r"relative_position_bias": "a transformer with relative positions (Swin, BEiT)",
}


def load_backbone(
    path: str | Path,
    key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    backbone: nn.Module | None = None,
) -> nn.Module:
    """The backbone of a checkpoint, in eval mode on the CPU: images (B, 3, h, w) -> features (B,
    D).

    path: a training checkpoint of ours or of the official code, the folder of a run, a bare state
    dict of a backbone, also one under `state_dict` or `model` or in a .safetensors file, one of
    DINOv2 without registers, or the folder of a Hugging Face ViT; a classifier beside it is left
    out with a warning. key: "teacher" or "student", or another name
    under which the file holds weights. arch, patch_size: only needed when the file does not tell.
    "untrained" gives the same network with random weights, to compare with. backbone: a module of
    your own that takes the weights, and returns what it returns:
    `nn.features.features` pools that to (B, D). Raises `ValueError` when the weights do not fit.
    """
    path = in_folder(Path(path))
    state = read(path)
    saved = arguments_in(state)
    untrained = key == "untrained" and key not in state
    key = "teacher" if untrained else key
    weights, is_backbone = weights_in(path, state, key)
    told = arch or saved.get("arch") or ""
    told = OLD_NAMES.get(told, told) if isinstance(told, str) else ""
    if backbone is None:
        if told in (*VITS, ""):
            weights = from_hugging_face(weights)
        if not is_backbone:
            weights = below(path, weights, (PATCHES,), key)
        if _is_vit(weights) and told in (*VITS, ""):
            weights, _ = without_layer_scale(weights)
            backbone = _vit_for(path, weights, told)
            check_config(path, backbone)
        elif told or isinstance(state.get("arch"), str):
            cfg = Config(
                arch=told or state["arch"],
                patch_size=patch_size or saved.get("patch_size", 16),
                in_channels=saved.get("in_channels", 3),
            )
            backbone = _by_name(path, cfg, weights)
        else:
            name_foreign(path, weights)
            raise ValueError(f"'{path}' does not tell its architecture: name it with `arch`.")
    if untrained:
        return backbone.eval()
    wanted = backbone.state_dict()
    if not is_backbone:
        weights = below(path, weights, tuple(wanted), key)
    weights, beside = without_head(weights, wanted)
    if beside:
        warnings.warn(
            f"'{path}' holds more than a backbone ({', '.join(beside[:2])}): that is left out.",
            stacklevel=2,
        )
    if weights.keys() != wanted.keys():
        name_foreign(path, weights, wanted)
    for name in check_fit(path, backbone, weights, "backbone", _way_out(saved, arch, patch_size)):
        if name.endswith(("running_mean", "running_var")):  # the features would be, too
            raise ValueError(_not_finite(path, name, "backbone"))
    backbone.load_state_dict(weights)
    return backbone.eval()


def _way_out(saved: Mapping[str, Any], arch: str | None, patch_size: int | None) -> str:
    """What there is to do where the weights do not fit a backbone: the options that were given and
    are not those of the file, else those that may be given."""
    given = {"arch": arch and OLD_NAMES.get(arch, arch), "patch_size": patch_size}
    told = {k: OLD_NAMES.get(v, v) if isinstance(v, str) else v for k, v in saved.items()}
    other = [f"`{k}` {saved[k]}" for k, v in given.items() if v and told.get(k, v) != v]
    if other:
        return f": it was saved with {' and '.join(other)}, name that or nothing"
    return ": name the `arch` and `patch_size` of these weights, or pass your own module, backbone="


def _by_name(path: Path, cfg: Config, weights: Mapping[str, Any]) -> nn.Module:
    try:
        return build_backbone(cfg, 0.0, weights)
    except UnknownArch as error:
        raise ValueError(
            f"'{path}' holds a backbone `arch` {cfg.arch}, which is no name that can be built "
            f"here.{error.hint} One of your own is loaded in Python, load_backbone(path, "
            "backbone=...), and evaluated there, dinofast.knn(path, data_path, backbone=...)."
        ) from error


def arguments(path: str | Path) -> dict[str, Any]:
    """The options that a checkpoint was trained with, which answer `["arch"]` and `.arch`; empty
    when it does not tell. Of a folder of transformers or timm what it says of the images."""
    path = in_folder(Path(path))
    return arguments_in(read(path, mmap=True)) or with_attributes(preparation_beside(path))


def check_rgb(path: str | Path, backbone: nn.Module, trained_with: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a backbone of images that are not RGB, as its `arguments` or our ViT's
    own weights tell."""
    channels = trained_with.get("in_channels", 3)
    if isinstance(backbone, vit.VisionTransformer):
        channels = backbone.patch_embed.proj.weight.shape[1]
    if channels != 3:
        raise ValueError(
            f"'{path}' takes images of {counted(channels, 'channel')}, and here they are RGB: load "
            "it in Python, dinofast.load_backbone(path), and give it its images there."
        )


def numbered(folder: Path) -> list[Path]:
    """checkpointNNNN.pth in a folder, the newest first."""
    found = [p for p in folder.glob("checkpoint*.pth") if re.fullmatch(r"checkpoint\d+", p.stem)]
    return sorted(found, key=lambda p: int(p.stem.removeprefix("checkpoint")), reverse=True)


def in_folder(path: Path) -> Path:
    """The checkpoint of a run's folder; a file as it is."""
    if not path.is_dir():
        return path
    for file in (path / "checkpoint.pth", *numbered(path)):
        if file.is_file():
            return file
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".safetensors"))
    if len(others) == 1:
        return path / others[0]
    hint = f"name one of its files ({', '.join(others[:5])})" if others else "name a file"
    raise ValueError(f"'{path}' is a folder without checkpoint.pth: {hint}.")


def check_fit(
    path: Path, module: nn.Module, weights: Mapping[str, Any], what: str, hint: str
) -> list[str]:
    """Raise `ValueError` where names or shapes are not the module's, or a parameter is not finite.

    hint: the way out, where they are not.

    Returns the names of buffers that are no longer finite: a backbone may mean that, as a mask or a
    running maximum. One that is not finite in the fresh module either is nothing to tell.
    """
    fresh, given = module.state_dict(), mapping_of(weights)
    for name in [*fresh, *given]:
        here, there = shape_in(fresh, name), shape_in(given, name)
        if here != there and here != "not made yet":
            raise ValueError(
                f"'{path}' does not fit this {what}: '{name}' is {there} in the file and {here} "
                f"here{hint}."
            )
    spoiled = [n for n, v in given.items() if not finite(v) and finite(fresh[n])]
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name in spoiled:
        if name in parameters or what == "dino_loss":
            raise ValueError(_not_finite(path, name, what))
    return spoiled


def finite(value: Any) -> bool:
    """Whether all numbers of a tensor of any kind are; True of what holds none."""
    if not isinstance(value, Tensor) or is_lazy(value) or value.is_quantized or value.is_meta:
        return True
    if not (value.is_floating_point() or value.is_complex()):
        return True
    if value.is_nested or value.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr):
        value = value.values()
    elif value.layout == torch.sparse_coo:
        value = value._values()
    try:
        # float8 knows no isfinite
        return bool(torch.isfinite(value.float() if value.itemsize == 1 else value).all())
    except RuntimeError:  # kinds without arithmetic
        return True


def weights_under(path: Path, state: Mapping[str, Any], key: str, prefix: str = "") -> Weights:
    """`mapping_of` what a file holds under a key. Raises `ValueError` where that is no weights."""
    held = state[key]
    if not isinstance(held, Mapping) or not held:
        what = "an empty dict" if isinstance(held, Mapping) else a_kind(held)
        raise ValueError(f"'{path}' holds {what} under '{key}', where weights should be.")
    return mapping_of(held, prefix)


def mapping_of(state: Mapping[str, Any], prefix: str = "") -> Weights:
    """Weights by name, without a prefix, and with them the versions that modules of torch save as
    `_metadata`."""
    named = OrderedDict((str(n).removeprefix(prefix), value) for n, value in state.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping):
        named._metadata = {  # type: ignore[attr-defined]
            f"{n}.".removeprefix(prefix).removesuffix("."): v for n, v in versions.items()
        }
    return named


def shape_in(weights: Mapping[str, Any], name: str) -> Any:
    """As it is told to a person: a shape, or what stands there instead."""
    if name not in weights:
        return "absent"
    value = weights[name]
    if not isinstance(value, Tensor):
        return "no tensor"
    if is_lazy(value):
        return "not made yet"
    return "nested" if value.is_nested else tuple(value.shape)


def _not_finite(path: Path, name: str, what: str) -> str:
    return (
        f"'{path}' holds numbers that are not finite, in '{name}' of the {what}: go back to an "
        "earlier checkpoint."
    )


def weights_in(path: Path, state: Mapping[str, Any], key: str) -> tuple[Weights, bool]:
    """The weights of a file: under `key`, under the one name that others use, or all there is; and
    whether they are of a backbone alone, as in DINO's own files."""
    if key in state:
        weights = unwrapped(weights_under(path, state, key))
        is_backbone = any(name.startswith("backbone.") for name in weights)
        return inside(weights, "backbone.") if is_backbone else weights, is_backbone
    if "teacher" in state or "student" in state:
        raise ValueError(
            f"'{path}' has no '{key}': choose from "
            f"{', '.join(k for k in ('teacher', 'student') if k in state)}."
        )
    holders = {k: v for k, v in state.items() if isinstance(v, Mapping) and _is_weights(v)}
    usual = [name for name in holders if name in _CONTAINERS]
    if len(usual) == 1 or len(holders) == 1:
        return unwrapped(mapping_of(holders[[*usual, *holders][0]])), False
    if holders:
        first = next(iter(holders))
        raise ValueError(
            f"'{path}' holds weights under {', '.join(map(repr, holders))}: choose with `key`, "
            f"load_backbone(path, key={first!r})."
        )
    if not _is_weights(state):
        held = {
            **state,
            **{k: v for s in state.values() if isinstance(s, dict) for k, v in s.items()},
        }
        array = next((k for k, v in held.items() if isinstance(v, np.ndarray)), None)
        if array is not None:
            raise ValueError(
                f"'{path}' holds NumPy arrays ('{array}') where tensors should be: make them "
                "tensors with torch.from_numpy and save them again."
            )
        names = f", only {', '.join(map(str, list(state)[:5]))}" if state else ""
        raise ValueError(f"'{path}' holds no weights{names}: name another file.")
    return unwrapped(mapping_of({k: v for k, v in state.items() if k != "args"})), False


def _is_weights(state: Mapping[str, Any]) -> bool:
    """An optimizer's state has no tensors at its first level."""
    return any(isinstance(value, Tensor) for value in state.values())


def unwrapped(weights: Weights) -> Weights:
    """Without what data parallelism and `torch.compile` set before every name."""
    for wrapper in _WRAPPERS * 2:
        if weights and all(name.startswith(wrapper) for name in weights):
            weights = mapping_of(weights, wrapper)
    return weights


def below(path: Path, weights: Weights, wanted: Sequence[str], key: str) -> Weights:
    """The weights below the prefix (`backbone.`, `model.`, `teacher.backbone.`) under which most of
    the wanted names stand; all where there is none. Of several as good the one that `key` tells."""
    prefixes = {
        name.removesuffix(known)
        for known in wanted[:8]
        for name in weights
        if f".{name}".endswith(f".{known}")
    }
    found = {prefix: sum(prefix + name in weights for name in wanted) for prefix in prefixes}
    best = sorted(p for p in found if found[p] == max(found.values()))
    if len(best) > 1:
        chosen = [p for p in best if key in re.split(r"[._]", p) or p == f"{key}."]
        if len(chosen) != 1:
            raise ValueError(
                f"'{path}' holds several backbones, under {', '.join(best)}: choose with `key`, "
                f"load_backbone(path, key={best[0].rstrip('.')!r})."
            )
        best = chosen
    return inside(weights, best[0] if best else "")


def inside(weights: Weights, prefix: str) -> Weights:
    """Those with a prefix, without it."""
    kept = mapping_of(weights)
    for name in weights:
        if not name.startswith(prefix):
            del kept[name]
    return mapping_of(kept, prefix)


def without_head(weights: Weights, wanted: Mapping[str, Any]) -> tuple[Weights, list[str]]:
    """Without what a backbone does not have, the layers for class scores, or a decoder; and the
    names of that."""
    beside = [
        name
        for name in weights
        if _NOT_BACKBONE.match(name)
        and not any(other.startswith(name.rpartition(".")[0] + ".") for other in wanted)
        and name not in wanted
    ]
    kept = mapping_of(weights)
    for name in beside:
        del kept[name]
    return kept, beside


def _is_vit(weights: Mapping[str, Any]) -> bool:
    dims = [getattr(weights.get(name), "ndim", 0) for name in (PATCHES, "pos_embed")]
    return dims == [4, 3]


def _vit_for(path: Path, weights: Mapping[str, Any], arch: str) -> vit.VisionTransformer:
    """Our ViT of this width, patch and number of positions."""
    name_foreign(path, weights)
    width, channels, patch, _ = weights[PATCHES].shape
    arch = arch or VIT_OF_WIDTH.get(width, "")
    if arch not in VITS:
        raise ValueError(
            f"'{path}' does not tell its architecture (width {width}): name it with `arch`."
        )
    side = math.isqrt(max(weights["pos_embed"].shape[1] - 1, 0))
    return getattr(vit, arch)(patch_size=patch, img_size=(side * patch,), in_chans=channels)


def name_foreign(
    path: Path,
    weights: Mapping[str, Any],
    wanted: Mapping[str, Any] = MappingProxyType({}),
    way_out: str = "build that model with its own library and pass it as load_backbone(..., "
    "backbone=model), or name timm's with `arch`",
) -> None:
    """Raise `ValueError` for weights that are known to be of something else."""
    if is_linear(weights):
        raise ValueError(
            f"'{path}' holds a linear classifier alone ('{next(iter(weights))}'), as "
            "eval_linear.py saves it: give the checkpoint of the backbone it was trained on."
        )
    if weights and all(re.match(r"(head\.)?(mlp\.|last_layer\.)", name) for name in weights):
        raise ValueError(
            f"'{path}' holds a projection head alone ('{next(iter(weights))}'): give the "
            "checkpoint of its backbone."
        )
    for pattern, whose in _FOREIGN.items():
        name = next((n for n in weights if n not in wanted and re.search(pattern, n)), None)
        if name is not None:
            raise ValueError(
                f"'{path}' holds weights of {whose} ('{name}'), which dinofast's ViTs have no "
                f"place for: {way_out}."
            )


def is_linear(weights: Mapping[str, Any]) -> bool:
    """Whether these are the weight and the bias of one layer, and nothing else."""
    if not 1 <= len(weights) <= 2 or len({n.rpartition(".")[0] for n in weights}) > 1:
        return False
    ends = {n.rpartition(".")[2]: v for n, v in weights.items()}
    return ends.keys() <= {"weight", "bias"} and getattr(ends.get("weight"), "ndim", 0) == 2
