"""What the protocols of linear classification share: features of the last blocks, batches of
images, which images are trained on, and accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...data.sampler import epoch_order
from ...nn.features import features
from ...nn.vit import VisionTransformer
from ...runtime.backends import cores
from ...runtime.progress import counting
from ...runtime.terminal import say
from ...runtime.words import counted
from ..frozen import FrozenBackbone, features_and_rows, left_out, none_readable
from ..images import LabeledImages

BLOCKS = 4  # of ViTs, at most: as many as the official and DINOv2's evaluation look at
HELD_OUT = 10  # one image of so many chooses
# in place of an epoch's number in `epoch_order`, which counts from 0
_FEW, _HOLD = 2**32 - 1, 2**32 - 2


@dataclass(frozen=True)
class Choice:
    """Columns of `block_features` that a classifier sees, and what they are."""

    name: str
    columns: slice


def block_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """images (B, 3, h, w) -> features (B, K) of which each of `choices` is some columns: CLS of the
    last BLOCKS blocks of a ViT, the last one behind, and the mean of its patch tokens. Of other
    backbones what they return, pooled to (B, D)."""
    if not isinstance(backbone, VisionTransformer):
        return features(backbone, images)
    layers = backbone.get_intermediate_layers(images, BLOCKS)  # of fewer blocks all
    return torch.cat([*(x[:, 0] for x in layers), layers[-1][:, 1:].mean(1)], dim=1)


def choices(backbone: nn.Module, width: int) -> list[Choice]:
    """Features to choose from, as DINOv2 does, in the `width` columns of `block_features`."""
    if not isinstance(backbone, VisionTransformer):
        return [Choice("pooled output", slice(0, width))]
    d = backbone.embed_dim
    n = width // d - 1
    one, several = slice((n - 1) * d, n * d), slice(0, n * d)
    found = [Choice("CLS", one), Choice("CLS + mean of patches", slice(one.start, width))]
    if n > 1:
        found.append(Choice(f"CLS of {n} blocks", several))
        found.append(Choice(f"CLS of {n} blocks + mean of patches", slice(0, width)))
    return found


def batches(
    frozen: FrozenBackbone,
    images: LabeledImages,
    batch_size: int,
    num_workers: int,
    what: str,
    told: set[str | Path],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, h, w) and labels (B,), both on the backbone's device, in order, without those
    that cannot be read; these are named unless `told` holds them. what: of the line of progress.
    Raises `ValueError` if none can be read."""
    labels, seen, tell = torch.tensor(images.labels), 0, counting(what, True)
    for batch, rows, bad_files in images.batches(batch_size, min(num_workers, cores())):
        for path, reason in bad_files:
            if path not in told:
                say(left_out(path, reason))
                told.add(path)
        if len(rows):
            seen += len(rows)
            device = frozen.device
            yield batch.to(device, non_blocking=True), labels[rows].to(device)
            tell(seen, len(images))
    if not seen:
        raise ValueError(none_readable(len(images)))


def extract(
    frozen: FrozenBackbone, images: LabeledImages, batch_size: int, num_workers: int
) -> tuple[Tensor, Tensor]:
    """`block_features` (N, K) fp32 and labels (N,) of all images, on the CPU."""
    take, workers = partial(block_features, frozen.module.eval()), min(num_workers, cores())
    found, rows = features_and_rows(take, images, frozen.device, batch_size, workers)
    return found, torch.tensor(images.labels)[rows]


def few_of_each(images: LabeledImages, per_class: int, seed: int) -> LabeledImages:
    """per_class images of each class, drawn by `seed`, in the order of the files; of a class with
    fewer all, and a line says so."""
    labels = np.array(images.labels)
    chosen, short = list[int](), 0
    order = epoch_order(seed, _FEW, len(labels))
    for label in np.unique(labels):
        own = order[labels[order] == label][:per_class]
        short += len(own) < per_class
        chosen += own.tolist()
    if short:
        say(f"{counted(short, 'class', 'classes')} with fewer than {per_class} images: all of them")
    return images.pick(sorted(chosen))


def held_out(labels: Tensor, seed: int) -> Tensor:
    """Which of the training images choose and are not trained on: (N,) bool, drawn by `seed`. Of
    each class a tenth, rounded, but one at least if it has two. Raises `ValueError` if that is
    none."""
    numbers = labels.numpy()
    order, chosen = epoch_order(seed, _HOLD, len(numbers)), torch.zeros(len(numbers)).bool()
    for label in np.unique(numbers):
        own = order[numbers[order] == label]
        n = max(1, round(len(own) / HELD_OUT)) if len(own) > 1 else 0
        chosen[torch.from_numpy(own[:n])] = True
    if not chosen.any():
        raise ValueError(
            "no class has two training images, so none can be held out to choose by: give more "
            "images, or `protocol` official, which chooses nothing."
        )
    return chosen


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of scores (..., B, C) have their label (B,) first, and among the first five: int64
    (..., 2). Scores that are not finite hit nothing."""
    best = scores.topk(min(5, scores.shape[-1]), dim=-1)
    right = (best.indices == labels[:, None]) & best.values[..., :1].isfinite()
    return torch.stack((right[..., 0].sum(-1), right.any(-1).sum(-1)), dim=-1)


def percent(counts: Tensor, n: int, n_classes: int) -> dict[str, float]:
    """{"top1", "top5"} of `hits` (2,) among n images; no top-5 of fewer than five classes, as in
    the official code."""
    top1, top5 = (100 * count / n for count in counts.tolist())
    return {"top1": top1, "top5": top5} if n_classes >= 5 else {"top1": top1}


def in_percent(accuracy: dict[str, float]) -> str:
    """`Top1: 71.4, Top5: 98.0`, as the k-NN evaluation prints it."""
    return ", ".join(f"{name.capitalize()}: {value:.1f}" for name, value in accuracy.items())
