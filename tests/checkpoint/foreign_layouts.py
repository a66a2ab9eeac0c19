"""Our ViT's weights as other projects would hold them, with layer scales where they have such."""

import re

import torch


def hugging_face(weights, scales=None, version=4):
    """Of `ViTModel`, or with scales (one of (D,) a branch of a block) of `Dinov2Model`, by the
    names of transformers 4 or 5."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    vit = scales is None
    inside = {
        "norm1": "layernorm_before" if vit else "norm1",
        "norm2": "layernorm_after" if vit else "norm2",
        "attn.proj": "attention.output.dense" if version == 4 else "attention.o_proj",
        "mlp.fc1": "intermediate.dense" if version == 4 and vit else "mlp.fc1",
        "mlp.fc2": "output.dense" if version == 4 and vit else "mlp.fc2",
    }
    qkv = "attention.attention.{}" if version == 4 else "attention.{}_proj"
    qkv = [qkv.format(x if version == 4 else x[0]) for x in ("query", "key", "value")]
    where = "layers" if version == 5 and vit else "encoder.layer"
    named = {}
    for name, value in weights.items():
        block = re.match(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if block is None:
            start = next(n for n in names if name.startswith(n))
            named[name.replace(start, names[start])] = value
        elif block[2] == "attn.qkv":
            for part, chunk in zip(qkv, value.chunk(3), strict=True):
                named[f"{where}.{block[1]}.{part}.{block[3]}"] = chunk.clone()
        else:
            named[f"{where}.{block[1]}.{inside[block[2]]}.{block[3]}"] = value
    for (block, branch), gamma in (scales or {}).items():
        named[f"{where}.{block}.layer_scale{branch}.lambda1"] = gamma
    return named


def random_scales(depth, width):
    return {(b, i): torch.rand(width) + 0.5 for b in range(depth) for i in (1, 2)}


def dinov2(weights, scales, chunks=False):
    """Of facebookresearch/dinov2; chunks: as its training saves them."""
    named = {**weights, "mask_token": torch.zeros(1, weights["cls_token"].shape[-1])}
    for (block, branch), gamma in scales.items():
        named[f"blocks.{block}.ls{branch}.gamma"] = gamma
    if chunks:
        named = {re.sub(r"^blocks\.", "blocks.0.", name): value for name, value in named.items()}
    return named
