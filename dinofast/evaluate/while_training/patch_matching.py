"""Whether patches keep saying what lies where: matching patches of two crops of an image.

Dense features may get worse in long runs while those of whole images still get better (DINOv3,
arXiv 2508.10104, section 4). This score needs no labels: the plan of the augmentation tells which
place of one crop shows what which place of the other shows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 1.0  # distance, in patches, up to which a match is right


def patch_matching(features: Tensor, views: np.ndarray) -> float:
    """Share of the patches of an image's first crop, of those that its second crop shows, whose
    most similar patch there, by cosine, lies at most NEAR patches from the right place.

    features (n, 2, rows, columns, D), any float dtype; views (n, 2) of `augmentation.VIEW`, whose
    boxes and flips are used. nan if no two crops overlap.
    """
    right, shown = matched(features, views)
    return right / shown if shown else math.nan


def matched(features: Tensor, views: np.ndarray) -> tuple[int, int]:
    """How many patches `patch_matching` finds right, and of how many."""
    rows, columns = features.shape[2:4]
    first, second = F.normalize(features.float(), dim=-1).flatten(2, 3).unbind(1)  # (n, P, D) each
    best = (first @ second.transpose(1, 2)).argmax(-1).cpu()
    found = torch.stack((best // columns, best % columns), -1) + 0.5
    places = torch.from_numpy(_places(views, rows, columns))  # (n, P, 2)
    inside = ((places >= 0) & (places <= torch.tensor([rows, columns]))).all(-1)
    near = (found - places).norm(dim=-1) <= NEAR
    return int(near[inside].sum()), int(inside.sum())


def _places(views: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Where the middle of each patch of the first crops lies in the second ones: float64 (n, rows
    columns, 2), row and column in patches from the upper left corner; beyond the crop if it does
    not show that place."""
    size = np.array([rows, columns], np.float64)
    middle = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1) + 0.5
    share = (middle.reshape(1, -1, 2) / size).repeat(len(views), 0)  # of the crop, (n, P, 2)
    first, second = views[:, 0], views[:, 1]
    share[first["flip"], :, 1] = 1 - share[first["flip"], :, 1]
    there = first["box"][:, None, :2] + share * first["box"][:, None, 2:]  # pixels of the image
    share = (there - second["box"][:, None, :2]) / second["box"][:, None, 2:]
    share[second["flip"], :, 1] = 1 - share[second["flip"], :, 1]
    return share * size
