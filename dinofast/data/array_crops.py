"""The plan carried out on images of any number of channels and any depth, in float32.

Brightness, contrast and blur mean the same for every kind of channel. Hue, saturation, gray and
solarization are of colors that people see: they are left out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST = 0, 1  # of `augmentation.VIEW`


def render(image: np.ndarray, view: np.void) -> Tensor:
    """One crop by one element of the plan (`augmentation.VIEW`): image float32 (H, W, C) in [0, 1]
    -> float32 (C, size, size) in [0, 1].

    Cut, resized by antialiased bicubic, flipped; brightness and contrast in the order of the plan,
    the same for all channels: contrast about the mean of each channel of the crop; Gaussian blur
    whose standard deviation is the radius.
    """
    y, x, h, w = view["box"].tolist()
    pixels = torch.from_numpy(np.ascontiguousarray(image[y : y + h, x : x + w]))
    crop = pixels.permute(2, 0, 1)[None]
    size = int(view["size"])
    crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    if view["flip"]:
        crop = crop.flip(-1)
    if view["jitter"]:
        for operation in view["order"].tolist():
            factor = float(view["factors"][operation])
            if operation == BRIGHTNESS:
                crop = (crop * factor).clamp(0, 1)
            elif operation == CONTRAST:
                mean = crop.mean((2, 3), keepdim=True)
                crop = (mean + (crop - mean) * factor).clamp(0, 1)
    if view["blur_radius"] > 0:
        crop = _blurred(crop, float(view["blur_radius"]))
    return crop[0].contiguous()


def _blurred(crop: Tensor, sigma: float) -> Tensor:
    """By a Gaussian of this standard deviation, cut off after three of it; the border goes on."""
    reach = min(max(1, math.ceil(3 * sigma)), crop.shape[-1] - 1)
    if reach < 1:
        return crop
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    weights = (weights / weights.sum()).expand(crop.shape[1], 1, 1, -1)
    padded = F.pad(crop, (reach, reach, reach, reach), mode="replicate")
    across = F.conv2d(padded, weights, groups=crop.shape[1])
    return F.conv2d(across, weights.transpose(2, 3), groups=crop.shape[1])
