"""The plan: every random choice of the augmentation.

Each number is a pure function of (seed, epoch, sample, view) by a counter-based generator. So
neither the number of workers, the batch size, the number of processes nor the backend that executes
the plan can change it, and any step can be drawn without those before it. All but the boxes is
drawn for a batch at once; a box depends on the size of its image, which is known when the image is
decoded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dinofast.data.philox import philox

# One view of one sample, aligned as a C struct. Factors and `order` number the color operations 0
# brightness, 1 contrast, 2 saturation, 3 hue; `order` lists them as they are applied. A blur radius
# of 0 means no blur.
VIEW = np.dtype(
    [
        ("box", np.int32, 4),  # y, x, height, width in the image, pixels
        ("size", np.int32),  # side of the crop, pixels
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("order", np.uint8, 4),
        ("factors", np.float64, 4),
        ("gray", np.bool_),
        ("blur_radius", np.float64),  # pixels of the crop
        ("solarize", np.bool_),
    ],
    align=True,
)

FLIP_P, JITTER_P, GRAY_P = 0.5, 0.8, 0.2
FACTORS_LOW = np.array([0.6, 0.6, 0.8, -0.1])
FACTORS_HIGH = np.array([1.4, 1.4, 1.2, 0.1])
ORDERS = np.array(list(itertools.permutations(range(4))), np.uint8)
TRIES = 10
RATIO = (3 / 4, 4 / 3)
BLOCKS = TRIES + 3  # of four numbers each, per sample and view


@dataclass(frozen=True)
class View:
    """How one crop is drawn: its side, its share of the image's area, and what differs between
    kinds of crop."""

    size: int
    scale: tuple[float, float]
    blur_p: float
    solarize_p: float
    blur_radius: tuple[float, float]


def uniforms(seed: int, epoch: int, samples: np.ndarray, n_views: int) -> np.ndarray:
    """Numbers in [0, 1) that decide on samples (B,): float64 (B, V, BLOCKS, 4)."""
    samples = np.asarray(samples)[:, None, None]  # (B, 1, 1)
    return philox(np.arange(BLOCKS), np.arange(n_views)[:, None], samples, epoch, seed) * 2.0**-32


class Draw(NamedTuple):
    """What is drawn for a batch before its images are decoded."""

    views: np.ndarray  # VIEW (B, V), boxes still zero
    tries: np.ndarray  # float64 (B, V, TRIES, 4), for `boxes`

    def plan(self, b: int, height: int, width: int) -> np.ndarray:
        """The plan of image b of the batch, whose size in pixels this is: VIEW (V,)."""
        plan = self.views[b].copy()
        plan["box"] = boxes(self.tries[b], height, width)
        return plan


@dataclass(frozen=True)
class Augmentation:
    """The views of each image under one seed. resolutions: number of crops and side in pixels,
    global crops first."""

    seed: int
    views: tuple[View, ...]

    @property
    def resolutions(self) -> list[tuple[int, int]]:
        return [(len(group), group[0].size) for group in (self.views[:2], self.views[2:]) if group]

    def draw(self, epoch: int, samples: np.ndarray) -> Draw:
        return draw(self.seed, epoch, samples, self.views)


def draw(seed: int, epoch: int, samples: np.ndarray, views: Sequence[View]) -> Draw:
    """Draw all views of a batch. samples (B,): indices into the dataset, below 2^32."""
    u = uniforms(seed, epoch, samples, len(views))
    switch, rest, color = (u[:, :, TRIES + i] for i in range(3))  # (B, V, 4) each
    blur_low, blur_high = np.array([v.blur_radius for v in views]).T  # (V,)
    plan = np.zeros(u.shape[:2], VIEW)
    plan["size"] = [v.size for v in views]
    plan["flip"] = switch[..., 0] < FLIP_P
    plan["jitter"] = switch[..., 1] < JITTER_P
    plan["gray"] = switch[..., 2] < GRAY_P
    plan["solarize"] = switch[..., 3] < [v.solarize_p for v in views]
    radius = blur_low + rest[..., 1] * (blur_high - blur_low)
    plan["blur_radius"] = np.where(rest[..., 0] < [v.blur_p for v in views], radius, 0)
    plan["order"] = ORDERS[(rest[..., 2] * len(ORDERS)).astype(np.int64)]
    plan["factors"] = FACTORS_LOW + color * (FACTORS_HIGH - FACTORS_LOW)
    tries = u[:, :, :TRIES]
    # (V, 1): share of the image's area
    low, high = np.array([v.scale for v in views]).T[:, :, None]
    tries[..., 0] = low + tries[..., 0] * (high - low)
    tries[..., 1] = np.exp(
        math.log(RATIO[0]) + tries[..., 1] * (math.log(RATIO[1]) - math.log(RATIO[0]))
    )
    return Draw(plan, tries)


def boxes(tries: np.ndarray, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Boxes (y, x, height, width) of V views of an image, by the rule of torchvision's
    `RandomResizedCrop.get_params`.

    tries (V, TRIES, 4): share of the area, aspect ratio, and y and x as numbers in [0, 1). The
    first try that fits wins; if none does, the largest central box of an allowed ratio. Scalar
    code: 13 us for ten views; NumPy takes 64 us for one image and 18 us an image for 64 of one
    known size (one core, 2026-11-27).
    """
    found = []
    for view in tries.tolist():
        for share, ratio, y, x in view:
            area = height * width * share
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                found.append((int(y * (height - h + 1)), int(x * (width - w + 1)), h, w))
                break
        else:
            found.append(_central_box(height, width))
    return found


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    h = round(width / RATIO[0]) if width / height < RATIO[0] else height
    w = round(height * RATIO[1]) if width / height > RATIO[1] else width
    return (height - h) // 2, (width - w) // 2, h, w
