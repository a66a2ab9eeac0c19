"""The vision transformer of the official DINO: same parameter names, same results (arXiv 2010.11929 and 2104.14294).

Axes: B images, N tokens (CLS first), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention, attention_weights

_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class DropPath(nn.Module):
    """Stochastic depth by sample (arXiv 1603.09382): the branch is 0 with probability `rate`, else scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)
        return x * mask


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> Sequence[Tensor]:
        """x (B, N, D) -> q, k, v, each (B, H, N, D / H)."""
        b, n, d = x.shape
        return self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.split_heads(x)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path: float,
                 norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)                                       # (B, N - 1, D)


class VisionTransformer(nn.Module):
    """Images (B, 3, h, w), any size of at least one patch -> CLS features (B, D).

    img_size: side(s) of the image whose patch grid the learned positions fit; other sizes interpolate them. init_std: standard
    deviation of the linear layers at the start, "fan_in" for fan_in ** -0.5 (suits narrow models that train for minutes).
    """

    def __init__(self, img_size: Sequence[int] = (224,), patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768,
                 depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, qkv_bias: bool = True,
                 drop_path_rate: float = 0.0, norm_layer: Callable[[int], nn.Module] = _LAYER_NORM,
                 init_std: float | str = 0.02) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}: choose one that divides the "
                             "other.")
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.grid = img_size[0] // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]               # grows over the depth
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, norm_layer) for rate in rates)
        self.norm = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, module.in_features**-0.5 if init_std == "fan_in" else float(init_std))

    def interpolate_pos_encoding(self, h: int, w: int) -> Tensor:
        """Positions (1, N, D) for images of h x w pixels: the learned ones, or these resampled bicubically as officially done.

        The official scale factor carries + 0.1 against rounding, which shifts the sampling grid; kept, or results would differ.
        """
        if h == w and h // self.patch_embed.patch_size == self.grid:
            return self.pos_embed
        rows, cols = h // self.patch_embed.patch_size, w // self.patch_embed.patch_size
        grid = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / self.grid, (cols + 0.1) / self.grid), mode="bicubic")
        assert grid.shape[-2:] == (rows, cols)
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> tokens with positions (B, N, D)."""
        h, w = x.shape[-2:]
        patches = self.patch_embed(x)
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), patches), dim=1)
        return tokens + self.interpolate_pos_encoding(h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepare_tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block, (B, H, N, N); row 0 is what CLS looks at."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        q, k, _ = last.attn.split_heads(last.norm1(x))
        return attention_weights(q, k)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Normalised outputs (B, N, D) of the last n blocks."""
        x = self.prepare_tokens(x)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.blocks) - i <= n:
                layers.append(self.norm(x))
        return layers


def init_linear_(layer: nn.Linear, std: float = 0.02) -> None:
    """Truncated normal weights, zero bias: the official initialisation."""
    nn.init.trunc_normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def vit_tiny(patch_size: int = 16, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """ViT-Ti: width 192, 12 blocks, 3 heads; 5.5 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=192, num_heads=3, drop_path_rate=drop_path_rate, **options)


def vit_small(patch_size: int = 16, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """ViT-S: width 384, 12 blocks, 6 heads; 21.7 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=384, num_heads=6, drop_path_rate=drop_path_rate, **options)


def vit_base(patch_size: int = 16, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """ViT-B: width 768, 12 blocks, 12 heads; 85.8 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=768, num_heads=12, drop_path_rate=drop_path_rate, **options)


def vit_nano(patch_size: int = 4, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """Not an official size: width 64, 2 blocks, 2 heads, 0.11 M parameters, learns from 32-pixel crops in minutes on a CPU."""
    options = {"img_size": (32,), "init_std": "fan_in", **options}
    return VisionTransformer(patch_size=patch_size, embed_dim=64, depth=2, num_heads=2, drop_path_rate=drop_path_rate,
                             **options)
