"""Stochastic depth (arXiv 1603.09382): which sequences a residual branch is left out for, drawn for all blocks at once.

Axes: S sequences, T tokens; each block has two branches, attention and MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Layout, layout, made_once

MODES = ("mask", "skip")


class Kept(NamedTuple):
    """The sequences that a branch is computed for, packed as the others are; `factor` makes up for those left out."""

    where: Layout                        # of the kept ones
    sequences: Tensor                    # (S',) int64: which they are
    tokens: Tensor                       # (T',) int64: rows of all their tokens
    factor: Tensor                       # (S',) float32: sequences of this size over those kept


def draw_scales(rates: Sequence[float], where: Layout) -> list[Tensor | None]:
    """The official way: each sequence loses a branch with probability `rate`, and what stays is divided by 1 - rate.

    For each block (2, S) float32 to multiply its branches by, None where nothing is dropped. All work is done and part of it
    multiplied by 0.
    """
    device = where.cls.device
    keep = _kept_rates(tuple(rates), device)                                                   # (blocks, 1, 1)
    scales = (torch.rand(len(rates), 2, len(where.cls), device=device) < keep) / keep
    return [scale if rate > 0 else None for scale, rate in zip(scales.unbind(0), rates, strict=True)]


@made_once
def _kept_rates(rates: tuple[float, ...], device: torch.device) -> Tensor:
    return 1 - torch.tensor(rates, dtype=torch.float32).view(-1, 1, 1).to(device)


def draw_kept(rates: Sequence[float], where: Layout) -> list[tuple[Kept, Kept] | None]:
    """The cheap way: of n sequences of a size each branch is computed for round(n (1 - rate)), at least one, drawn anew.

    Each sequence is left out as often as officially, up to that rounding, but always equally many at a time; the expected
    output is the same. None where nothing is left out.
    """
    device = where.cls.device
    orders = [torch.rand(len(rates), 2, n, device=device).argsort(-1) for n, _ in where.runs]
    return [tuple(_keep(rate, [order[i, branch] for order in orders], where) for branch in range(2)) if rate > 0 else None
            for i, rate in enumerate(rates)]


def _keep(rate: float, orders: list[Tensor], where: Layout) -> Kept:
    """orders: a permutation (n,) for each run."""
    runs, sequences, tokens, factors, sequence, token = [], [], [], [], 0, 0
    for (n, length), order in zip(where.runs, orders, strict=True):
        m = max(1, round(n * (1 - rate)))
        chosen = order[:m]
        runs.append((m, length))
        sequences.append(chosen + sequence)
        tokens.append((chosen[:, None] * length + token + torch.arange(length, device=chosen.device)).flatten())
        factors.append(torch.full((m,), n / m, device=chosen.device))
        sequence, token = sequence + n, token + n * length
    return Kept(layout(tuple(runs), where.cls.device), torch.cat(sequences), torch.cat(tokens), torch.cat(factors))
