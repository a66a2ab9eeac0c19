"""A folder for timm: config.json and model.safetensors, as timm's own on the Hugging Face Hub.

Our ViTs have timm's names of parameters and its epsilon (1e-6). One of a width that timm has no
name for, or of another size of image or patch, is the nearest name with `model_args`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.packages import TIMM_OPTIONS
from ..runtime.words import one_line
from .files import CONFIG, WEIGHTS, is_folder_of, write_json, write_weights
from .source import CROP_PCT, Source

SUFFIX, FILES, NEEDS = "", (CONFIG, WEIGHTS), ("safetensors",)
ANY_SIZE = False
KEY = "architecture"  # in such a config.json
# timm's names of our ViTs with patches of 16
_NAMES = {"vit_tiny": "vit_tiny", "vit_small": "vit_small", "vit_base": "vit_base"}
_WITH_PATCH_8 = ("vit_small", "vit_base")


def check(source: Source) -> None:
    """Raise `ValueError` for a backbone that timm does not have."""
    if source.vit is None:
        _named(source)


def architecture(source: Source) -> tuple[str, dict[str, Any]]:
    """timm's name, and the arguments that make it this backbone."""
    vit = source.vit
    if vit is None:
        return source.arch, _named(source)
    args: dict[str, Any] = {}
    patch = 8 if source.patch == 8 and source.arch in _WITH_PATCH_8 else 16
    if source.patch != patch:
        args["patch_size"] = source.patch
    if source.side != 224:
        args["img_size"] = source.side
    if source.arch not in _NAMES:
        args["embed_dim"], args["depth"] = vit.embed_dim, len(vit.blocks)
        args["num_heads"] = vit.embed_dim // vit.head_width
    return f"{_NAMES.get(source.arch, 'vit_tiny')}_patch{patch}_224", args


def _named(source: Source) -> dict[str, Any]:
    """The arguments with which timm's model of this name has these weights, and takes images of
    this size where one does."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"whether timm has {source.arch} can only be told where it is installed: pip install "
            "timm."
        ) from error
    if not timm.is_model(source.arch):
        raise ValueError(
            f"timm has no model {source.arch}: `format` onnx and torchscript take all backbones."
        )
    reason: Exception = ValueError()
    fitting = []
    for args in TIMM_OPTIONS:
        try:
            model = timm.create_model(source.arch, num_classes=0, **args)
            model.load_state_dict(source.module.state_dict())
        except Exception as error:  # an option that others of timm have, or other weights
            reason = error
            continue
        fitting.append(args)
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, source.side, source.side))
            return args
        except Exception as error:  # images of one size
            reason = error
    if fitting:
        raise ValueError(
            f"timm's {source.arch} takes no images of {source.side} x {source.side} "
            f"({one_line(reason)}): give its size as `image_size`."
        )
    raise ValueError(
        f"timm's {source.arch} has other weights than this one ({one_line(reason)}): `format` "
        "onnx and torchscript take all backbones."
    )


def is_kind(path: Path) -> bool:
    return is_folder_of(path, FILES, KEY)


def write(source: Source, path: Path) -> None:
    name, args = architecture(source)
    write_weights(path / WEIGHTS, source.module.state_dict(), {})
    pretrained = {
        "input_size": [3, source.side, source.side],
        "interpolation": "bicubic",
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
        "mean": list(source.mean),
        "std": list(source.std),
        "num_classes": 0,
    }
    if source.vit:
        pretrained |= {
            "fixed_input_size": True,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    config: dict[str, Any] = {"architecture": name, "num_classes": 0, "model_args": args}
    if source.vit:
        config |= {"num_features": source.vit.embed_dim, "global_pool": "token"}
    write_json(path / CONFIG, {**config, "pretrained_cfg": pretrained})


def load(path: Path) -> Callable[[Tensor], Tensor]:
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def usage(path: Path) -> list[str]:
    name = repr(f"local-dir:{path}")
    return [
        f"load it: import timm; model = timm.create_model({name}, pretrained=True).eval()",
        "features: model(images)",
    ]
