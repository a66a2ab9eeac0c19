"""The measures of DAVIS 2017 (arXiv 1704.00675): region similarity J and contour accuracy F, as the
challenge's own evaluation defines them for semi-supervised segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BOUND = 0.008  # of the diagonal: boundaries that are no farther apart match
RECALL_ABOVE = 0.5
BINS = 4  # decay: the mean of a video's first quarter minus that of its last


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two bool masks (h, w); 1 where both are empty."""
    either = np.logical_or(mask, truth).sum()
    return float(np.logical_and(mask, truth).sum() / either) if either else 1.0


def contour_accuracy(mask: np.ndarray, truth: np.ndarray, bound: float = BOUND) -> float:
    """F: harmonic mean of the shares of each boundary that lie near the other one.

    mask, truth (h, w) bool. Near: within a disk of ceil(bound * diagonal) pixels. Where one
    boundary alone is empty, 0; where both are, 1.
    """
    own, other = boundary(mask), boundary(truth)
    if not own.any() or not other.any():
        return float(own.any() == other.any())
    radius = math.ceil(bound * math.hypot(*mask.shape))
    precision = (own & dilate(other, radius)).sum() / own.sum()
    recall = (other & dilate(own, radius)).sum() / other.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a bool mask (h, w) that differ from the one at the right, below, or right below;
    at the image's right and lower edge from the one along the edge. So lines are one pixel wide
    and lie half a pixel up and left."""
    mask = np.asarray(mask, bool)
    right, below, beyond = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    beyond[:-1, :-1] = mask[1:, 1:]
    found = (mask ^ right) | (mask ^ below) | (mask ^ beyond)
    found[-1] = mask[-1] ^ right[-1]
    found[:, -1] = mask[:, -1] ^ below[:, -1]
    found[-1, -1] = False
    return found


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels (h, w) with one of the mask's within `radius`: Euclidean, and the disk's own edge
    counts."""
    h, w = mask.shape
    out = np.zeros((h, w), bool)
    # of each row, how many lie left of a column: a run of a disk is a difference of two of these
    before = np.zeros((h, w + 1), np.int32)
    np.cumsum(mask, axis=1, out=before[:, 1:])
    columns = np.arange(w)
    for dy in range(-min(radius, h - 1), min(radius, h - 1) + 1):
        half = math.isqrt(radius * radius - dy * dy)
        low, high = np.clip(columns - half, 0, w), np.clip(columns + half + 1, 0, w)
        there = before[:, high] > before[:, low]
        out[max(0, -dy) : h - max(0, dy)] |= there[max(0, dy) : h - max(0, -dy)]
    return out


@dataclass(frozen=True)
class Statistics:
    """Of one object's values over the frames: mean, share above RECALL_ABOVE, and decay."""

    mean: float
    recall: float
    decay: float


def statistics(values: np.ndarray) -> Statistics:
    """values: (frames,) of J or F. The quarters share their borders, as in the challenge's own
    evaluation, which rounds these half up."""
    edges = np.linspace(1, len(values), BINS + 1)
    ids = np.round(edges + 1e-10).astype(int) - 1
    first, last = values[ids[0] : ids[1] + 1], values[ids[-2] : ids[-1] + 1]
    return Statistics(
        float(values.mean()),
        float((values > RECALL_ABOVE).mean()),
        float(first.mean() - last.mean()),
    )


def measure(masks: np.ndarray, truth: np.ndarray) -> list[tuple[Statistics, Statistics]]:
    """J and F of each object of a video.

    masks, truth (frames, h, w) of numbers, 0 the background; in truth 255 counts as background. The
    objects are 1 to the largest number in the first frame of truth; the first frame, which was
    given, and the last are not counted.
    """
    truth = np.where(truth == 255, 0, truth)
    found = []
    for number in range(1, int(truth[0].max()) + 1):
        pairs = [
            (mask == number, own == number)
            for mask, own in zip(masks[1:-1], truth[1:-1], strict=True)
        ]
        j = np.array([region_similarity(*pair) for pair in pairs])
        f = np.array([contour_accuracy(*pair) for pair in pairs])
        found.append((statistics(j), statistics(f)))
    return found
