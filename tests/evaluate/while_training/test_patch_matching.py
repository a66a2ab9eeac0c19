"""Patches of two crops of an image are matched by the plan's boxes."""

import math

import numpy as np
import pytest
import torch

from dinofast.data.augmentation import VIEW
from dinofast.evaluate.while_training.patch_matching import matched, patch_matching

SIDE = 8


def views(*boxes: tuple, flips: tuple = (False, False)) -> np.ndarray:
    """One image's two crops."""
    made = np.zeros((1, 2), VIEW)
    made["box"], made["flip"] = boxes, flips
    return made


def seen(view: np.void) -> torch.Tensor:
    """What patches say who know their place in the image: (rows, columns, D), most alike where they
    are nearest."""
    y, x, h, w = (int(v) for v in view["box"])
    middle = (torch.arange(SIDE) + 0.5) / SIDE
    across = 1 - middle if view["flip"] else middle
    rows, columns = torch.meshgrid(y + middle * h, x + across * w, indexing="ij")
    angles = torch.stack((rows, columns), -1) / 100
    return torch.cat((angles.sin(), angles.cos()), -1)


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "boxes", [((0, 0, 64, 64), (0, 0, 64, 64)), ((0, 0, 64, 64), (16, 24, 60, 50))]
)
def test_patches_that_know_their_place_are_all_matched(boxes, flips):
    plan = views(*boxes, flips=flips)
    features = torch.stack([seen(view) for view in plan[0]])[None]
    assert patch_matching(features, plan) == 1.0


def test_only_what_both_show_counts():
    half = views((0, 0, 64, 64), (0, 32, 64, 64))
    features = torch.stack([seen(view) for view in half[0]])[None]
    assert matched(features, half) == (32, 32)
    apart = views((0, 0, 32, 32), (0, 32, 32, 32))
    assert math.isnan(patch_matching(features, apart))


def test_patches_that_say_nothing_are_matched_by_chance():
    """Every patch is most like the first: right for those whose place is near it."""
    plan = views((0, 0, 64, 64), (0, 0, 64, 64))
    right, shown = matched(torch.ones(1, 2, SIDE, SIDE, 4), plan)
    assert shown == 64 and right == 3  # itself, and its two neighbors
    noise = torch.randn(40, 2, SIDE, SIDE, 32, generator=torch.Generator().manual_seed(0))
    share = patch_matching(noise, np.repeat(plan, 40, 0))
    assert 0.03 < share < 0.12  # about 5 of 64


def test_a_crop_turned_over_is_not_matched_by_those_that_ignore_it():
    plan = views((0, 0, 64, 64), (0, 0, 64, 64), flips=(True, False))
    features = torch.stack([seen(plan[0][1])] * 2)[None]
    assert patch_matching(features, plan) < 0.3
