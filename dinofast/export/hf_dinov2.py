"""A folder for Hugging Face's transformers: a `Dinov2Model` whose layer scales are 1, for what
takes a backbone (segmentation, detection, depth). `AutoBackbone.from_pretrained` of transformers 5
asks the Hub for whatever it is given and finds no folder (5.24): `Dinov2Backbone`'s does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .files import CONFIG, WEIGHTS, is_folder_of, need_vit, write_json, write_weights
from .hf import KEY, PROCESSOR, config_of, named, quietly, write_processor
from .source import Source

SUFFIX, FILES, NEEDS = "", (CONFIG, WEIGHTS, PROCESSOR), ("safetensors",)
ANY_SIZE = False
_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def check(source: Source) -> None:
    need_vit(source, "hf-dinov2")


def is_kind(path: Path) -> bool:
    return is_folder_of(path, FILES, KEY)


def write(source: Source, path: Path) -> None:
    config = config_of(source)
    depth, width = config["num_hidden_layers"], config["hidden_size"]
    config |= {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "mlp_ratio": 4,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "out_indices": [depth],
        "out_features": [f"stage{depth}"],
    }
    weights = named(source.module.state_dict(), _IN_BLOCK)
    weights["embeddings.mask_token"] = torch.zeros(1, width)
    for i in range(depth):
        for branch in (1, 2):
            weights[f"encoder.layer.{i}.layer_scale{branch}.lambda1"] = torch.ones(width)
    write_weights(path / WEIGHTS, weights, {})
    write_json(path / CONFIG, config)
    write_processor(source, path)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    from transformers import Dinov2Model

    model = quietly(lambda: Dinov2Model.from_pretrained(path))
    return lambda images: model(images).last_hidden_state[:, 0]


def usage(path: Path) -> list[str]:
    return [
        "load it: from transformers import AutoImageProcessor, Dinov2Backbone; model = "
        f"Dinov2Backbone.from_pretrained({str(path)!r})",
        "maps (B, D, rows, columns): model(images).feature_maps",
        f"prepare images: AutoImageProcessor.from_pretrained({str(path)!r})",
    ]
