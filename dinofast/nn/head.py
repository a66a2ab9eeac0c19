"""The projection head of DINO: an MLP, a normalized bottleneck, and weight-normed prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .onednn_linear import Linear


class Prototypes(nn.Module):
    """Bias-free linear layer with rows `g v / ||v||` (weight norm, arXiv 1602.07868): (B, D) -> (B,
    K).

    Owns `weight_g` (K, 1) and `weight_v` (K, D) under the names that official checkpoints use.
    """

    def __init__(self, in_dim: int, out_dim: int, trainable_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=trainable_norm)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(x, weight)


class DINOHead(nn.Module):
    """Features (B, in_dim) -> prototype logits (B, out_dim), as the official `DINOHead`.

    norm_last_layer: hold the prototypes' norms at 1 (`weight_g` frozen). The bottleneck is
    normalized in fp32 under any autocast: in fp16 its square sum can vanish, a known source of NaN
    in the official code.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        if nlayers <= 1:
            self.mlp: nn.Module = Linear(in_dim, bottleneck_dim)
        else:
            layers: list[nn.Module] = []
            for width in [in_dim] + [hidden_dim] * (nlayers - 2):
                layers.append(Linear(width, hidden_dim))
                if use_bn:
                    layers.append(nn.BatchNorm1d(hidden_dim))
                layers.append(nn.GELU())
            self.mlp = nn.Sequential(*layers, Linear(hidden_dim, bottleneck_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, trainable_norm=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        return self.last_layer(x.to(self.last_layer.weight_v.dtype))
