"""Crops of any channels: the plan's operations by their formulas, and PIL's results within its
rounding."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast.data import backend_pil
from dinofast.data.array_crops import render
from dinofast.data.augmentation import VIEW


def plan(box=(0, 0, 24, 32), size=12, **changes) -> np.void:
    view = np.zeros((), VIEW)
    view["box"], view["size"], view["order"] = box, size, (0, 1, 2, 3)
    view["factors"] = 1.0
    for name, value in changes.items():
        view[name] = value
    return view[()]


@pytest.fixture(scope="module")
def image():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((32, 24), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("box", [(0, 0, 24, 32), (3, 5, 10, 20), (0, 0, 6, 6)])
@pytest.mark.parametrize("flip", [False, True])
def test_cut_resize_and_flip_are_pil_s(image, box, flip):
    view = plan(box, flip=flip)
    ours = render(image.astype(np.float32) / 255, view)
    theirs = torch.tensor(backend_pil.render(Image.fromarray(image), view)).permute(2, 0, 1) / 255
    assert (ours - theirs).abs().max() < 1.6 / 255


@pytest.mark.parametrize("operation, factor", [(0, 0.7), (1, 1.3), (1, 0.6)])
def test_brightness_and_contrast(image, operation, factor):
    factors = np.ones(4)
    factors[operation] = factor
    values = image.astype(np.float32) / 255 * 0.5 + 0.25
    plain, found = (
        render(values, plan(jitter=jitter, factors=factors)) for jitter in (False, True)
    )
    mean = plain.mean((1, 2), keepdim=True)
    wanted = plain * factor if operation == 0 else mean + (plain - mean) * factor
    torch.testing.assert_close(found, wanted.clamp(0, 1))


def test_colors_of_people_are_left_out(image):
    """Saturation and hue, gray and solarization change nothing."""
    values = image.astype(np.float32) / 255
    factors = np.array([1.0, 1.0, 0.2, 0.1])
    changed = plan(jitter=True, factors=factors, gray=True, solarize=True)
    torch.testing.assert_close(render(values, changed), render(values, plan()))


def test_the_order_is_the_plan_s(image):
    values, factors = image.astype(np.float32) / 255, np.array([1.4, 1.4, 1, 1])
    first, second = (
        render(values, plan(jitter=True, factors=factors, order=order))
        for order in ((0, 1, 2, 3), (1, 0, 2, 3))
    )
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.0])
def test_blur_is_a_gaussian(radius):
    """Of a point: its weights; the sum stays."""
    values = np.zeros((33, 33, 2), np.float32)
    values[16, 16] = 1.0, 0.5
    view = plan((0, 0, 33, 33), 33, blur_radius=radius)
    found = render(values, view)
    d = torch.arange(33) - 16.0
    weights = torch.exp(-0.5 * (d[:, None] ** 2 + d[None] ** 2) / radius**2)
    torch.testing.assert_close(found[0], weights / weights.sum(), rtol=0, atol=2e-3)
    torch.testing.assert_close(found[1], found[0] / 2)
    torch.testing.assert_close(found.sum((1, 2)), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_any_number_of_channels(channels):
    values = np.random.default_rng(1).random((20, 20, channels), np.float32)
    found = render(values, plan((1, 2, 15, 10), 8, blur_radius=1.0, jitter=True, flip=True))
    assert found.shape == (channels, 8, 8) and found.min() >= 0 and found.max() <= 1
