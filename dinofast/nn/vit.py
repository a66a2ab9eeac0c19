"""The vision transformer of the official DINO: same parameter names, same results (arXiv 2010.11929
and 2104.14294).

All crops of a pass, of whatever sizes, run as one packed sequence, so that each linear layer is one
matrix product. Axes: B images, S sequences (one a crop), T tokens of all sequences (of each its CLS
token first), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attention, attention_weights
from .drop_path import draw_scales
from .onednn_linear import Linear, linear
from .packing import Layout, PackedCrops, patchify
from .weight_copies import operand

_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.impl = "sdpa"  # of attention.ATTENTIONS
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D) -> q, k, v, each (T, H, D / H)."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        return q, k, v

    def forward(self, x: Tensor, where: Layout) -> Tensor:
        return self.proj(attention(*self.split_heads(x), where, self.impl).flatten(1))

    def forward_cls(self, x: Tensor, where: Layout) -> Tensor:
        """What `forward` gives in the rows of the CLS tokens, (S, D), without the queries of all
        others."""
        dim, library = x.shape[1], getattr(self.qkv, "library", "blas")
        weight, bias = operand(self.qkv, "weight"), operand(self.qkv, "bias")
        q = linear(
            x.index_select(0, where.cls),
            weight[:dim],
            None if bias is None else bias[:dim],
            library,
        )
        kv = linear(x, weight[dim:], None if bias is None else bias[dim:], library)
        k, v = kv.view(x.shape[0], 2, self.num_heads, -1).unbind(1)
        return self.proj(
            attention(q.view(q.shape[0], self.num_heads, -1), k, v, where, self.impl).flatten(1)
        )


class Block(nn.Module):
    """x + attention, then + MLP, with what stochastic depth has drawn: scales (2, S)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, where: Layout, drawn: Tensor | None = None, cls_only: bool = False
    ) -> Tensor:
        """x (T, D) -> (T, D), or with `cls_only` the rows (S, D) of the CLS tokens, at a fraction
        of the work."""
        attend = self.attn.forward_cls if cls_only else self.attn
        branch = attend(self.norm1(x), where)
        # its backward adds; that of x[...] sorts first
        x = x.index_select(0, where.cls) if cls_only else x
        if drawn is None:
            x = x + branch
            return x + self.mlp(self.norm2(x))
        scale = (drawn if cls_only else drawn[:, where.sequence])[:, :, None]
        x = x + (branch * scale[0]).to(x.dtype)
        return x + (self.mlp(self.norm2(x)) * scale[1]).to(x.dtype)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, which is one matrix product over patches, by one of
    linear.LIBRARIES."""

    library = "blas"

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.proj.reads_copies = True  # type: ignore[assignment]  # torch: tensors and modules alone

    def forward(self, pixels: Tensor) -> Tensor:
        """(P, C p p) -> (P, D)."""
        return linear(
            pixels,
            operand(self.proj, "weight").flatten(1),
            operand(self.proj, "bias"),
            self.library,
        )


class VisionTransformer(nn.Module):
    """Images (B, 3, h, w), any size of at least one patch, or one such tensor per size -> CLS
    features (all images, D).

    img_size: side(s) of the image whose patch grid the learned positions fit; other sizes
    interpolate them. init_std: standard deviation of the linear layers at the start, "fan_in" for
    fan_in ** -0.5 (suits narrow models that train for minutes).
    """

    def __init__(
        self,
        img_size: Sequence[int] = (224,),
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = _LAYER_NORM,
        init_std: float | str = 0.02,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}: choose one "
                "that divides the other."
            )
        self.num_features = self.embed_dim = embed_dim
        self.head_width = embed_dim // num_heads
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.grid = img_size[0] // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, embed_dim))
        # grows over the depth
        self.drop_path_rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.grad_checkpointing = False  # see set_execution
        self.residual_dtype: torch.dtype | None = None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(
                    module, module.in_features**-0.5 if init_std == "fan_in" else float(init_std)
                )

    def positions(self, matrix: Tensor | None) -> Tensor:
        """Learned positions (N, D) of CLS and patches, resampled by a matrix of `resampling` unless
        it is None."""
        table = self.pos_embed[0]
        if matrix is None:
            return table
        with torch.autocast("cpu" if table.is_meta else table.device.type, enabled=False):
            return torch.cat((table[:1], matrix.to(table.dtype) @ table[1:]))

    def embed(self, patches: PackedCrops) -> Tensor:
        """Packed tokens with positions, (T, D)."""
        parts = self.patch_embed(patches.pixels).split(
            [n * rows * cols for n, rows, cols in patches.grids]
        )
        tokens = []
        for part, (n, rows, cols), matrix in zip(
            parts, patches.grids, patches.resampling, strict=True
        ):
            positions = self.positions(matrix)
            cls = (self.cls_token[0] + positions[:1]).expand(n, 1, -1)
            tokens.append(
                torch.cat((cls, part.view(n, rows * cols, -1) + positions[1:]), dim=1).flatten(0, 1)
            )
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def forward(self, x: Tensor | Sequence[Tensor] | PackedCrops) -> Tensor:
        """Images (n, 3, h, w), one such tensor per size, or what `pack` made of them -> (sum of n,
        D)."""
        if not isinstance(x, PackedCrops) and self._is_exported():
            sizes = [x] if isinstance(x, Tensor) else x
            parts = [
                self.norm(self._layers(images, len(self.blocks))[-1][:, 0]) for images in sizes
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        packed = x if isinstance(x, PackedCrops) else self.pack(x)
        where = packed.layout
        drawn = self.draw(where) if packed.drop_path is None else packed.drop_path
        x = self.embed(packed)
        if self.residual_dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual_dtype)
        for block, branches in zip(self.blocks[:-1], drawn[:-1], strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, where, branches, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, where, branches)
        return self.norm(self.blocks[-1](x, where, drawn[-1], cls_only=True))

    def set_execution(
        self,
        attention: str,
        grad_checkpointing: bool = False,
        library: str = "blas",
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        """How passes are done from now on: attention (one of ATTENTIONS), whether backward computes
        each block's insides anew instead of keeping them, linear layers (one of LIBRARIES), and the
        dtype of the tokens between branches under autocast (None: what the sums give, float32)."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.impl = attention
            if isinstance(module, (Linear, PatchEmbed)):
                module.library = library
        self.grad_checkpointing, self.residual_dtype = grad_checkpointing, residual_dtype

    def patchify(self, crops: Tensor | Sequence[Tensor]) -> PackedCrops:
        return patchify(crops, self.patch_embed.patch_size, self.grid)

    def pack(self, crops: Tensor | Sequence[Tensor]) -> PackedCrops:
        """What `forward` takes, of a student and, `first` of it, of its teacher: crops (n, C, h,
        w), or one tensor per size."""
        packed = self.patchify(crops)
        return packed._replace(drop_path=self.draw(packed.layout))

    def draw(self, where: Layout) -> tuple:
        """What stochastic depth leaves out, block by block."""
        if not self.training or self.drop_path_rates[-1] == 0:
            return (None,) * len(self.blocks)
        return tuple(draw_scales(self.drop_path_rates, where))

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block to images (B, 3, h, w): (B, H, N, N); row 0 is what CLS looks
        at."""
        if self._is_exported():
            block = self.blocks[-1]
            assert isinstance(block, Block)
            tokens = self._layers(x, len(self.blocks) - 1)[-1]
            q, k, _ = self._heads(block.attn, block.norm1(tokens))
            return attention_weights(q, k)
        packed = self.patchify(x)
        tokens, where = self.embed(packed), packed.layout
        for block in self.blocks[:-1]:
            tokens = block(tokens, where)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        q, k, _ = (
            part.unflatten(0, where.runs[0]).transpose(1, 2)
            for part in last.attn.split_heads(last.norm1(tokens))
        )
        return attention_weights(q, k)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Normalized outputs (B, N, D) of the last n blocks."""
        if self._is_exported():
            return [self.norm(tokens) for tokens in self._layers(x, len(self.blocks))[1:][-n:]]
        packed = self.patchify(x)
        tokens, where = self.embed(packed), packed.layout
        layers = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, where)
            if len(self.blocks) - i <= n:
                layers.append(self.norm(tokens).unflatten(0, where.runs[0]))
        return layers

    # ---- as exporters and tracers follow it: (B, N, D), nothing computed from the number of images
    def _is_exported(self) -> bool:
        drops = self.training and self.drop_path_rates[-1] > 0
        return is_exporting() and not drops

    def _layers(self, x: Tensor, depth: int) -> list[Tensor]:
        """Images (B, 3, h, w) -> tokens (B, N, D) before the first block and after each of the
        first `depth`."""
        patches = self.patch_embed.proj(x)  # (B, D, rows, cols)
        table = self.pos_embed[0]
        places = _resampled(table[1:], self.grid, x, patches).to(table.dtype)
        cls = (self.cls_token + table[:1]).expand(x.shape[0], -1, -1)
        layers = [torch.cat((cls, patches.flatten(2).transpose(1, 2) + places), dim=1)]
        for block in self.blocks[:depth]:
            assert isinstance(block, Block)
            q, k, v = self._heads(block.attn, block.norm1(layers[-1]))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = layers[-1] + block.attn.proj(attended)
            layers.append(tokens + block.mlp(block.norm2(tokens)))
        return layers

    def _heads(self, attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k, v, each (B, H, N, d)."""
        qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            "torch.jit.script does not take this ViT, whose forward has inputs of several types: "
            "use torch.jit.trace(model, images), whose result takes any number of images, or "
            "torch.export.export."
        )


def _resampled(table: Tensor, grid: int, x: Tensor, patches: Tensor) -> Tensor:
    """Positions (grid grid, D) for images x (B, 3, h, w) with patches (B, D, rows, cols): (rows
    cols, D), what `resampling` gives, which see. In operations that an exporter follows with h and
    w left open: no number of x becomes one of Python's."""
    fp32 = torch.float32  # whatever the default dtype is
    sides = [
        torch.ones(n, device=x.device, dtype=fp32).sum() for n in (*x.shape[2:], *patches.shape[2:])
    ]
    learned = (sides[0] == sides[1]) & (sides[2] == grid) & (sides[3] == grid)
    rest = 0.1 * (~learned).float()
    rows, cols = (
        _bicubic(torch.arange(n, device=x.device, dtype=fp32), (side + rest) / grid, grid)
        for n, side in zip(patches.shape[2:], sides[2:], strict=True)
    )
    square = table.float().unflatten(0, (grid, grid))
    return _taken(cols, _taken(rows, square).transpose(0, 1)).transpose(0, 1).flatten(0, 1)


Taps = list[tuple[Tensor, Tensor]]


def _bicubic(places: Tensor, scale: Tensor, grid: int) -> Taps:
    """F.interpolate's bicubic along one side, places (n,) being 0 .. n - 1: the four cells (n,) of
    each place and their weights (n,), which are 1 and 0 for a scale () of 1."""
    source = (places + 0.5) / scale - 0.5
    first, taps = source.floor(), []
    for tap in (-1, 0, 1, 2):
        d, a = (source - first - tap).abs(), -0.75
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        taps.append(((first + tap).clamp(0, grid - 1).long(), torch.where(d <= 1, near, far)))
    return taps


def _taken(taps: Taps, cells: Tensor) -> Tensor:
    """Cells (grid, m, D) -> (n, m, D), in fp32: a matrix product would be in bf16 or TF32 where
    autocast or the GPU says so."""
    parts = [cells.index_select(0, cell) * weight[:, None, None] for cell, weight in taps]
    return parts[0] + parts[1] + parts[2] + parts[3]


def is_exporting() -> bool:
    """Whether torch.export, an ONNX exporter or torch.jit.trace looks on."""
    if torch.compiler.is_compiling():
        # its function is true for any compiling in torch 2.11
        return torch.compiler._is_exporting_flag
    return torch._C._get_tracing_state() is not None


def init_linear_(layer: nn.Linear, std: float = 0.02) -> None:
    """Truncated normal weights, zero bias: the official initialization."""
    nn.init.trunc_normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def vit_tiny(patch_size: int = 16, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """ViT-Ti: width 192, 12 blocks, 3 heads; 5.5 M parameters."""
    return VisionTransformer(
        patch_size=patch_size, embed_dim=192, num_heads=3, drop_path_rate=drop_path_rate, **options
    )


def vit_small(patch_size: int = 16, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """ViT-S: width 384, 12 blocks, 6 heads; 21.7 M parameters."""
    return VisionTransformer(
        patch_size=patch_size, embed_dim=384, num_heads=6, drop_path_rate=drop_path_rate, **options
    )


def vit_base(patch_size: int = 16, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """ViT-B: width 768, 12 blocks, 12 heads; 85.8 M parameters."""
    return VisionTransformer(
        patch_size=patch_size, embed_dim=768, num_heads=12, drop_path_rate=drop_path_rate, **options
    )


def vit_nano(patch_size: int = 4, drop_path_rate: float = 0.0, **options) -> VisionTransformer:
    """Not an official size: width 64, 2 blocks, 2 heads, 0.11 M parameters, learns from 32-pixel
    crops in minutes on a CPU."""
    options = {"img_size": (32,), "init_std": "fan_in", **options}
    return VisionTransformer(
        patch_size=patch_size,
        embed_dim=64,
        depth=2,
        num_heads=2,
        drop_path_rate=drop_path_rate,
        **options,
    )
