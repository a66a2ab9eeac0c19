"""Pictures: colors of heat maps, what is laid over what, and sheets on which no caption leaves its
column."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dinofast.evaluate.pictures import enlarge, fit_caption, heat_colors, overlay, sheet, stretch


def test_heat_is_dark_to_light():
    """Inferno's ends, and lightness that only grows between them."""
    colors = heat_colors(torch.linspace(0, 1, 101)[None])  # (3, 1, 101)
    assert colors.shape == (3, 1, 101)
    torch.testing.assert_close(colors[:, 0, 0] * 255, torch.tensor([0.0, 0.0, 4.0]))
    torch.testing.assert_close(colors[:, 0, 100] * 255, torch.tensor([252.0, 255.0, 164.0]))
    lightness = (torch.tensor([0.299, 0.587, 0.114]) @ colors[:, 0]).diff()
    assert (lightness > 0).all()
    torch.testing.assert_close(
        heat_colors(torch.tensor([[-3.0, 7.0]])), heat_colors(torch.tensor([[0.0, 1.0]]))
    )


def test_stretch():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]])
    torch.testing.assert_close(
        stretch(maps, 1.0), torch.tensor([[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    )
    assert stretch(torch.rand(2, 3, 20, 20), 0.9).max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enlarge(dtype):
    """Constant stays constant, a patch's value stays in its middle, and nothing leaves the range of
    the map."""
    assert (enlarge(torch.full((2, 3, 4, 4), 0.5, dtype=dtype), (9, 7)) == 0.5).all()
    hot = torch.zeros(4, 4, dtype=dtype)
    hot[1, 2] = 1
    large = enlarge(hot, (36, 36))
    assert large.dtype == torch.float32 and large.min() == 0 and large.max() == 1
    assert divmod(int(large.argmax()), 36) == (13, 22)  # the middle of 9..17 and of 18..26


def test_overlay():
    """Red image: dimmed and paler where heat is 0, nearly the map's color where it is 1."""
    image = torch.zeros(1, 3, 1, 2)
    image[:, 0] = 1
    laid = overlay(image, torch.tensor([[[0.0, 1.0]]]), strength=0.75)
    dimmed = 0.3 * (0.299 + torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(laid[0, :, 0, 0], dimmed)
    expected = 0.25 * dimmed + 0.75 * torch.tensor([252.0, 255.0, 164.0]) / 255
    torch.testing.assert_close(laid[0, :, 0, 1], expected)


def test_sheet():
    image = torch.zeros(2, 3, 20, 20)
    image[1, 0] = 1.0  # second column red
    drawn = np.asarray(sheet([("a", image), ("b", image.flip(0))], gap=6, caption_width=30))
    assert drawn.shape == (2 * 26 + 6, 42 + 2 * 26, 3)
    first, second = drawn[:, 42:62], drawn[:, 68:88]
    assert (first[6:26] == 0).all() and (second[6:26] == (255, 0, 0)).all()
    assert (first[32:52] == (255, 0, 0)).all() and (second[32:52] == 0).all()
    assert (drawn[26:32] == 255).all()  # no caption leaves its row


@pytest.mark.parametrize("width", [40, 90, 160])
@pytest.mark.parametrize(
    "text", ["image", "attention, trained", "PCA of patch features, untrained"]
)
def test_captions_fit(text, width):
    lines, font = fit_caption(text, width)
    assert lines.replace("\n", " ") == text
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox(
        (0, 0), lines, font=font, spacing=2
    )
    assert right - left <= width and font.size >= 6


@pytest.mark.parametrize("text", ["PCA of patch features, untrained", "image"])
@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("side", [60, 21, 20, 3])
def test_captions_touch_neither_cells_nor_each_other(side, width, text):
    """Rows of low cells are as high as the caption; the cells stand in their middle."""
    rows = [(text, torch.zeros(1, 3, side, 90))] * 3 + [("image", torch.zeros(1, 3, side, 90))]
    drawn = np.asarray(sheet(rows, gap=8, caption_width=width))
    row, rest = divmod(len(drawn) - 8, 4)
    assert row >= 8 + side and rest == 0 and (row == 68 or side < 60)
    for r in range(5):
        assert (drawn[r * row : r * row + 8] == 255).all()
    assert (drawn[:, 8 + width : 16 + width] == 255).all() and (drawn[:, :8] == 255).all()
    for r in range(4):
        assert (drawn[8 + r * row : (r + 1) * row, 8 : 8 + width] < 128).any()
        above = 8 + r * row + (row - 8 - side) // 2
        cell = drawn[r * row : (r + 1) * row + 8, 16 + width : 106 + width]
        assert (cell == 0).sum() == side * 90 * 3
        assert (drawn[above : above + side, 16 + width : 106 + width] == 0).all()
