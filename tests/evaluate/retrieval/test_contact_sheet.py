"""Contact sheets: where pictures stand, their frames, and captions that stay below them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from dinofast.evaluate.retrieval.contact_sheet import (
    EMPTY,
    FONT,
    FRAME,
    GAP,
    OTHER,
    SAME,
    Cell,
    contact_sheet,
    shortened,
)

BLUE, PINK = (0, 0, 255), (255, 100, 200)


def where(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int, int]:
    """Box of the pixels of this color, and how many there are."""
    found = (np.asarray(sheet) == color).all(2)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, found.sum()


def test_pictures_and_frames():
    query = Cell(Image.new("RGB", (40, 40), BLUE), ("query.png", "cat"))
    cells = [
        Cell(Image.new("RGB", (64, 32), PINK), ("0.95", "cat"), SAME),
        Cell(None, ("0.90", "dog"), OTHER),
    ]
    sheet = contact_sheet(["a title"], [(query, cells)], side=64)
    left, top, right, bottom, n = where(sheet, BLUE)
    assert (right - left, bottom - top, n) == (64, 64, 64 * 64)
    x0, y0, x1, y1, n = where(sheet, PINK)  # as wide as the cell, half as high, in its middle
    assert (x1 - x0, y1 - y0, n) == (64, 32, 64 * 32) and y0 - top == bottom - y1 == 16
    x0, y0, x1, y1, n = where(sheet, SAME)
    assert (x1 - x0, n) == (64 + 2 * FRAME, (64 + 2 * FRAME) ** 2 - 64**2)
    gap = where(sheet, OTHER)[0] - x1
    assert gap == GAP and x0 - right > GAP  # the query stands apart
    assert (np.asarray(sheet)[y0 + FRAME : y1 - FRAME, x1 + GAP + FRAME :][:64, :64] == EMPTY).all()
    assert where(sheet, OTHER)[2] <= sheet.width and where(sheet, OTHER)[3] < sheet.height


def test_rows_may_be_of_different_length_and_a_title_of_any():
    cell = Cell(Image.new("RGB", (8, 8), BLUE), ())
    sheet = contact_sheet(["a long title " * 20, "b"], [(cell, []), (cell, [cell] * 3)], side=16)
    assert where(sheet, BLUE)[4] == 5 * 256
    assert sheet.width >= ImageFont.load_default(FONT).getlength("a long title " * 20)


@pytest.mark.parametrize("text", ["a.jpg", "n01440764_10026_of_a_very_long_name_0017.JPEG", ""])
def test_a_long_name_keeps_its_end(text):
    font = ImageFont.load_default(FONT)
    short = shortened(text, 100, font)
    assert font.getlength(short) <= 100
    assert short == text or (short.endswith("017.JPEG") and short.startswith("n0"))
