"""A folder for Hugging Face's transformers: a `ViTModel` without a pooler, and its image processor.

The names are those of transformers 4, which 5 reads and writes as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import CONFIG, WEIGHTS, is_folder_of, need_vit, write_json, write_weights
from .source import Source

PROCESSOR = "preprocessor_config.json"
SUFFIX, FILES, NEEDS = "", (CONFIG, WEIGHTS, PROCESSOR), ("safetensors",)
ANY_SIZE = False
KEY = "model_type"  # in such a config.json
_BICUBIC = 3  # PIL's number
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def check(source: Source) -> None:
    need_vit(source, "hf")


def named(weights: dict[str, Tensor], in_block: dict[str, str]) -> dict[str, Tensor]:
    """Our ViT's weights by the names of transformers. in_block: those within a block."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        module, _, end = name.rpartition(".")
        if not module or name in _NAMES:
            found[_NAMES[name]] = value
        elif (block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module)) is None:
            found[f"{_NAMES[module]}.{end}"] = value
        elif block[2] == "attn.qkv":
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"encoder.layer.{block[1]}.attention.attention.{part}.{end}"] = chunk
        else:
            found[f"encoder.layer.{block[1]}.{in_block[block[2]]}.{end}"] = value
    return found


def config_of(source: Source) -> dict[str, Any]:
    """What the configurations of `ViTModel` and `Dinov2Model` have in common."""
    vit = source.vit
    assert vit is not None
    return {
        "torch_dtype": "float32",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.embed_dim // vit.head_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": source.side,
        "patch_size": source.patch,
        "num_channels": 3,
        "qkv_bias": True,
    }


def write_processor(source: Source, path: Path) -> None:
    """As dinofast evaluates: shorter side, center crop, mean, std. In transformers 4 only this
    class of the two crops."""
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": source.resize},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": source.side, "width": source.side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
    }
    write_json(path / PROCESSOR, processor)


def is_kind(path: Path) -> bool:
    return is_folder_of(path, FILES, KEY)


def write(source: Source, path: Path) -> None:
    config = config_of(source)
    config |= {"architectures": ["ViTModel"], "model_type": "vit"}
    config["intermediate_size"] = 4 * config["hidden_size"]
    write_weights(path / WEIGHTS, named(source.module.state_dict(), _IN_BLOCK), {})
    write_json(path / CONFIG, config)
    write_processor(source, path)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    from transformers import ViTModel

    model = quietly(lambda: ViTModel.from_pretrained(path, add_pooling_layer=False))
    return lambda images: model(images).last_hidden_state[:, 0]


def quietly(make: Callable[[], Any]) -> Any:
    """Without the bars of transformers, which tell of a second of work."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return make()
    finally:
        if shown:
            logging.enable_progress_bar()


def usage(path: Path) -> list[str]:
    return [
        "load it: from transformers import AutoImageProcessor, ViTModel; model = "
        f"ViTModel.from_pretrained({str(path)!r}, add_pooling_layer=False)",
        "features: model(images).last_hidden_state[:, 0]",
        f"prepare images: AutoImageProcessor.from_pretrained({str(path)!r})",
    ]
