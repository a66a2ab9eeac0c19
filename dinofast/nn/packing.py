"""Crops of several sizes as one packed sequence of tokens: how they are cut into patches, and where
each sequence lies.

A run is (sequences, tokens of each): the crops of one resolution. Axes: S sequences (one a crop), T
tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.tensor_cache import cached_tensors
from .features import features

Runs = tuple[tuple[int, int], ...]


class Layout(NamedTuple):
    """Where the sequences lie: `runs`, and the same as tensors on the device, for kernels that read
    it there."""

    runs: Runs
    cu_seqlens: Tensor  # (S + 1,) int32: first token of each sequence, then T
    # (S + 1,) int32: 0, 1, ... S: the same where each sequence is its CLS token alone
    cls_cu_seqlens: Tensor
    cls: Tensor  # (S,) int64: row of each CLS token
    sequence: Tensor  # (T,) int64: which sequence a token belongs to

    @property
    def max_seqlen(self) -> int:
        return max(tokens for _, tokens in self.runs)


@cached_tensors
def layout(runs: Runs, device: torch.device) -> Layout:
    lengths = torch.tensor([tokens for n, tokens in runs for _ in range(n)], dtype=torch.int64)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    sequence = torch.arange(len(lengths)).repeat_interleave(
        lengths, output_size=sum(n * tokens for n, tokens in runs)
    )
    cls_cu_seqlens = torch.arange(len(cu_seqlens), dtype=torch.int32)
    return Layout(
        runs,
        *(
            x.to(device)
            for x in (cu_seqlens.int(), cls_cu_seqlens, cu_seqlens[:-1].clone(), sequence)
        ),
    )


class PackedCrops(NamedTuple):
    """Crops as our ViTs take them: cut into patches once for student and teacher, with all that is
    known before a weight is looked at."""

    pixels: Tensor  # (P, C p p), P the sum of n rows cols
    grids: tuple[tuple[int, int, int], ...]  # of each size: n crops of rows x cols patches
    layout: Layout  # of the tokens: CLS and patches of each crop
    # of the learned positions for each size, None where they fit
    resampling: tuple[Tensor | None, ...]
    drop_path: tuple | None = None  # what stochastic depth has drawn, block by block; None: not yet

    def first(self, k: int = 1) -> PackedCrops:
        """Those of the first k sizes, without a copy; nothing is drawn for them yet."""
        n_patches = sum(n * rows * cols for n, rows, cols in self.grids[:k])
        return PackedCrops(
            self.pixels[:n_patches],
            self.grids[:k],
            layout(self.layout.runs[:k], self.pixels.device),
            self.resampling[:k],
        )

    def through(self, backbone: nn.Module) -> Tensor:
        """Features (all crops, D)."""
        return backbone(self)


def group_by_size(crops: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors (n, C, h, w) of one size that stand next to each other as one, in the same order of
    rows."""
    groups: list[list[Tensor]] = []
    for crop in [crops] if isinstance(crops, Tensor) else crops:
        if groups and groups[-1][0].shape[-2:] == crop.shape[-2:]:
            groups[-1].append(crop)
        else:
            groups.append([crop])
    return tuple(group[0] if len(group) == 1 else torch.cat(group) for group in groups)


class GroupedCrops(NamedTuple):
    """Crops as any other backbone takes them: a pass for each size, of which batch statistics are
    taken."""

    images: tuple[Tensor, ...]

    def first(self, k: int = 1) -> GroupedCrops:
        return GroupedCrops(self.images[:k])

    def through(self, backbone: nn.Module) -> Tensor:
        """Features (all crops, D)."""
        parts = [features(backbone, images) for images in group_by_size(self.images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def patchify(crops: Tensor | Sequence[Tensor], patch_size: int, grid: int) -> PackedCrops:
    """crops: (n, C, h, w), or one tensor per size; grid: rows and columns of the learned positions.

    Pixels of a patch are in the order of a convolution's weight, and what does not fill a patch is
    left out, as it would.
    """
    p, parts, grids, matrices = patch_size, [], [], []
    for x in [crops] if isinstance(crops, Tensor) else crops:
        h, w = x.shape[2:]
        rows, cols = h // p, w // p
        if not rows or not cols:
            raise ValueError(
                f"images of {h} x {w} pixels hold no patch of {p} x {p}: give larger images or "
                "a smaller patch_size."
            )
        # (n, C, rows, p, cols, p)
        x = x[:, :, : rows * p, : cols * p].unflatten(3, (cols, p)).unflatten(2, (rows, p))
        parts.append(x.permute(0, 2, 4, 1, 3, 5).reshape(-1, x.shape[1] * p * p))
        grids.append((x.shape[0], rows, cols))
        fits = h == w and rows == grid  # officially, others are resampled even so
        matrices.append(None if fits else resampling(grid, rows, cols, x.device))
    pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
    where = layout(tuple((n, 1 + rows * cols) for n, rows, cols in grids), pixels.device)
    return PackedCrops(pixels, tuple(grids), where, tuple(matrices))


@cached_tensors
def resampling(grid: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """The matrix (rows cols, grid grid) that resamples a square grid of positions bicubically,
    which is linear.

    The official scale factor carries + 0.1 against rounding, which shifts the sampling points;
    kept, or results would differ.
    """
    unit = torch.eye(grid * grid, dtype=torch.float64).view(grid * grid, 1, grid, grid)
    resampled = F.interpolate(
        unit, scale_factor=((rows + 0.1) / grid, (cols + 0.1) / grid), mode="bicubic"
    )
    assert resampled.shape[-2:] == (rows, cols)
    return resampled.flatten(1).t().contiguous().to(device, torch.float32)
