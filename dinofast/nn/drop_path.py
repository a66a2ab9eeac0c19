"""Stochastic depth (arXiv 1603.09382): which sequences a residual branch is left out for, drawn for all blocks at once.

Axes: S sequences, T tokens; each block has two branches, attention and MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.tensor_cache import made_once
from .packing import Layout, layout_anew

LEAST = 2**20                            # tokens of a sequence, times its width squared: with fewer, leaving it out costs more
ROUND = 64                               # tokens


class Stretches(NamedTuple):
    """The sequences that a branch is computed for, where the host knows which: stretches of them, kept and left out in turns.

    Blank tokens make up a whole multiple of ROUND of those kept: a library prepares itself anew for each size that it meets.
    """

    where: Layout                        # of the kept ones, and the blank tokens as one sequence more
    sequences: list[int]                 # of each stretch; the first one is kept, and may be empty
    tokens: list[int]                    # the same in tokens
    blank: int
    factor: float

    def take(self, x: Tensor, cls_only: bool = False) -> Tensor:
        kept = list(x.split(self.sequences if cls_only else self.tokens)[::2])
        if self.blank and not cls_only:
            kept.append(x.new_zeros(self.blank, x.shape[1]))
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def add(self, x: Tensor, branch: Tensor, cls_only: bool = False) -> Tensor:
        sizes = self.sequences if cls_only else self.tokens
        parts, kept = list(x.split(sizes)), branch.split([*sizes[::2], branch.shape[0] - sum(sizes[::2])])
        parts[::2] = [part.add(more, alpha=self.factor) for part, more in zip(parts[::2], kept, strict=False)]  # not the blank
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def draw_stretches(rates: Sequence[float], where: Layout) -> list[tuple[Stretches, Stretches] | None]:
    """The official draw, of which nothing is computed that would be multiplied by 0; for a CPU, which waits for no device.

    Shapes change from step to step. What is dropped is 0 even where the branch would not be finite. A branch that loses all
    sequences computes the first one and multiplies it by 0, as a parameter without any gradient would not be updated.
    """
    return [scales if scales is None else tuple(_stretches(scale, where) for scale in scales.tolist())
            for scales in draw_scales(rates, where)]


def _stretches(scale: list[float], where: Layout) -> Stretches:
    """scale: of each sequence, 0 or the factor."""
    factor = max(scale)
    kept = [bool(s) for s in scale] if factor else [True, *[False] * (len(scale) - 1)]
    lengths = [tokens for n, tokens in where.runs for _ in range(n)]
    runs = tuple((sum(1 for _ in same), tokens) for tokens, same in
                 groupby(tokens for tokens, stays in zip(lengths, kept, strict=True) if stays))
    stretches = [[length for _, length in same] for _, same in groupby(zip(kept, lengths, strict=True), key=lambda x: x[0])]
    if not kept[0]:
        stretches.insert(0, [])
    tokens = [sum(stretch) for stretch in stretches]
    blank = -sum(tokens[::2]) % ROUND if len(tokens) > 1 else 0
    where = layout_anew(runs + ((1, blank),) if blank else runs, where.cls.device)
    return Stretches(where, [len(stretch) for stretch in stretches], tokens, blank, factor)
