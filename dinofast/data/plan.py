"""What is drawn: the order of the images and every random choice of the augmentation.

Each number is a pure function of (seed, epoch, sample, view): it comes from the counter-based generator Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So neither the number of workers, the batch size, the
number of processes nor the backend that executes the plan can change it, and any step can be drawn without those before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# One view of one sample, aligned as a C struct. Factors and `order` number the colour operations 0 brightness, 1 contrast,
# 2 saturation, 3 hue; `order` lists them as they are applied. A blur radius of 0 means no blur.
VIEW = np.dtype([
    ("box", np.int32, 4),  # y, x, height, width in the image, pixels
    ("size", np.int32),  # side of the crop, pixels
    ("flip", np.bool_),
    ("jitter", np.bool_),
    ("order", np.uint8, 4),
    ("factors", np.float64, 4),
    ("grey", np.bool_),
    ("blur_radius", np.float64),  # pixels of the crop
    ("solarise", np.bool_),
], align=True)

FLIP_P, JITTER_P, GREY_P = 0.5, 0.8, 0.2
FACTORS_LOW = np.array([0.6, 0.6, 0.8, -0.1])
FACTORS_HIGH = np.array([1.4, 1.4, 1.2, 0.1])
ORDERS = np.array(list(itertools.permutations(range(4))), np.uint8)
TRIES = 10
RATIO = (3 / 4, 4 / 3)
BLOCKS = TRIES + 3  # of four numbers each, per sample and view
SHUFFLE = 0xFFFFFFFF  # the "view" whose numbers order the epoch


@dataclass(frozen=True)
class View:
    """How one crop is drawn: its side, its share of the image's area, and what differs between kinds of crop."""

    size: int
    scale: tuple[float, float]
    blur_p: float
    solarise_p: float
    blur_radius: tuple[float, float]


def philox(c0, c1, c2, c3, key: int) -> np.ndarray:
    """Philox4x32-10 of counters (c0, c1, c2, c3), which broadcast, under a 64-bit key: uint32 of their shape + (4,)."""
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in (c0, c1, c2, c3))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = p1 >> word ^ c1 ^ np.uint64(k0), p1 & low, p0 >> word ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), -1).astype(np.uint32)


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of n samples seen in this epoch, int64 (n,): samples sorted by 64 random bits each."""
    bits = philox(np.arange((n + 1) // 2), SHUFFLE, 0, epoch, seed).astype(np.uint64)
    return np.argsort((bits[:, ::2] << np.uint64(32) | bits[:, 1::2]).ravel()[:n], kind="stable")


def uniforms(seed: int, epoch: int, samples: np.ndarray, n_views: int) -> np.ndarray:
    """Numbers in [0, 1) that decide on samples (B,): float64 (B, V, BLOCKS, 4)."""
    samples = np.asarray(samples)[:, None, None]  # (B, 1, 1)
    return philox(np.arange(BLOCKS), np.arange(n_views)[:, None], samples, epoch, seed) * 2.0**-32


def draw(seed: int, epoch: int, samples: np.ndarray, sizes: np.ndarray, views: Sequence[View]) -> np.ndarray:
    """The plan of a batch: a structured array (B, V) of type `VIEW`.

    samples (B,): positions in the index, below 2^32; sizes (B, 2): height and width of each image in pixels.
    """
    u = uniforms(seed, epoch, samples, len(views))
    switch, rest, colour = (u[:, :, TRIES + i] for i in range(3))  # (B, V, 4) each
    blur_low, blur_high = np.array([v.blur_radius for v in views]).T  # (V,)
    plan = np.zeros(u.shape[:2], VIEW)
    plan["box"] = boxes(u[:, :, :TRIES], sizes, np.array([v.scale for v in views]))
    plan["size"] = [v.size for v in views]
    plan["flip"] = switch[..., 0] < FLIP_P
    plan["jitter"] = switch[..., 1] < JITTER_P
    plan["grey"] = switch[..., 2] < GREY_P
    plan["solarise"] = switch[..., 3] < [v.solarise_p for v in views]
    radius = blur_low + rest[..., 1] * (blur_high - blur_low)
    plan["blur_radius"] = np.where(rest[..., 0] < [v.blur_p for v in views], radius, 0)
    plan["order"] = ORDERS[(rest[..., 2] * len(ORDERS)).astype(np.int64)]
    plan["factors"] = FACTORS_LOW + colour * (FACTORS_HIGH - FACTORS_LOW)
    return plan


def boxes(u: np.ndarray, sizes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Boxes (y, x, height, width), int64 (B, V, 4), by the rule of torchvision's `RandomResizedCrop.get_params`.

    u (B, V, TRIES, 4): numbers in [0, 1) for the area, the aspect ratio, y and x of each try; sizes (B, 2); scale (V, 2):
    smallest and largest share of the area. The first try that fits wins; if none does, the largest central box of an allowed
    ratio.
    """
    height, width = np.asarray(sizes, np.int64).T[:, :, None]  # (B, 1)
    low, high = scale.T[:, :, None]  # (V, 1)
    area = (height * width)[..., None] * (low + u[..., 0] * (high - low))  # (B, V, TRIES)
    ratio = np.exp(math.log(RATIO[0]) + u[..., 1] * (math.log(RATIO[1]) - math.log(RATIO[0])))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (0 < w) & (w <= width[..., None]) & (0 < h) & (h <= height[..., None])
    first = fits.argmax(-1)[..., None]
    w, h, uy, ux = (np.take_along_axis(a, first, -1)[..., 0] for a in (w, h, u[..., 2], u[..., 3]))  # (B, V)
    y = (uy * (height - h + 1)).astype(np.int64)
    x = (ux * (width - w + 1)).astype(np.int64)

    tall, wide = width / height < RATIO[0], width / height > RATIO[1]
    central_h = np.where(tall, np.rint(width / RATIO[0]).astype(np.int64), height)
    central_w = np.where(wide, np.rint(height * RATIO[1]).astype(np.int64), width)
    central = (height - central_h) // 2, (width - central_w) // 2, central_h, central_w
    return np.stack([np.where(fits.any(-1), a, b) for a, b in zip((y, x, h, w), central, strict=True)], -1)
