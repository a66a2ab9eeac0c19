"""Multi-head self-attention over the tokens of one resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` by torch's scaled dot product attention; q, k, v, result (B, H, N, d), any float dtype."""
    return F.scaled_dot_product_attention(q, k, v)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """The softmax itself, (B, H, N, N): what attention maps are made of. q, k (B, H, N, d)."""
    return torch.softmax((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5, dim=-1)
