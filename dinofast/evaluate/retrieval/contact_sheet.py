"""Contact sheets: rows of a query and what was found for it, a frame telling right from wrong. Only
Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIDE, FRAME, GAP, LINE, FONT = 128, 4, 10, 16, 13
# apart in lightness too, for those who see no green
SAME, OTHER = (56, 176, 96), (190, 30, 45)
INK, FAINT, EMPTY = (20, 20, 20), (120, 120, 120), (225, 225, 225)


class Cell(NamedTuple):
    """A picture, None where there is none, the lines below it, and the color of its frame, if
    any."""

    picture: Image.Image | None
    lines: Sequence[str]
    frame: tuple[int, int, int] | None = None


def contact_sheet(
    title: Sequence[str], rows: Sequence[tuple[Cell, Sequence[Cell]]], side: int = SIDE
) -> Image.Image:
    """The rows below the lines of a title: a query, a rule, and its neighbors, numbered. Pictures
    fit into squares of `side` pixels, lines below them are shortened to that width."""
    font = ImageFont.load_default(FONT)
    columns = 1 + max(len(found) for _, found in rows)
    below = max(len(cell.lines) for query, found in rows for cell in (query, *found))
    step, height = side + 2 * FRAME + GAP, side + 2 * FRAME + below * LINE + GAP
    head = GAP + LINE * (len(title) + 1) + GAP // 2
    width = max(columns * step + 3 * GAP, 2 * GAP + max(int(font.getlength(t)) for t in title))
    sheet = Image.new("RGB", (width, head + len(rows) * height + GAP // 2), "white")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(title):
        pen.text((GAP, GAP + i * LINE), line, INK if i == 0 else FAINT, font)
    lefts = [GAP, *(2 * GAP + column * step + GAP for column in range(1, columns))]
    for column, left in enumerate(lefts):
        name = str(column) if column else "query"
        pen.text((left + FRAME, head - LINE), name, FAINT, font)
    rule = (lefts[0] + step + lefts[1]) // 2 - GAP // 2 if columns > 1 else width
    pen.line((rule, head - LINE, rule, sheet.height - GAP), EMPTY, 2)
    for r, (query, found) in enumerate(rows):
        for left, cell in zip(lefts, (query, *found), strict=False):
            _draw(sheet, pen, cell, (left, head + r * height), side, font)
    return sheet


def _draw(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    cell: Cell,
    at: tuple[int, int],
    side: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = at
    outer = side + 2 * FRAME
    if cell.frame:
        pen.rectangle((x, y, x + outer - 1, y + outer - 1), cell.frame)
    pen.rectangle((x + FRAME, y + FRAME, x + FRAME + side - 1, y + FRAME + side - 1), EMPTY)
    if cell.picture:
        scale = side / max(cell.picture.size)
        size = [max(1, round(length * scale)) for length in cell.picture.size]
        shown = cell.picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        sheet.paste(shown, (x + (outer - size[0]) // 2, y + (outer - size[1]) // 2))
    for i, line in enumerate(cell.lines):
        text = shortened(line, side + FRAME, font)
        pen.text((x + FRAME, y + outer + 1 + i * LINE), text, FAINT if i else INK, font)


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, without its middle where it is wider than `width` pixels: the end of a file's name
    tells more than what comes before."""
    kept = len(text)
    short = text
    while font.getlength(short) > width and kept > 2:
        kept -= 1
        short = text[: kept // 3] + "..." + text[len(text) - (kept - kept // 3) :]
    return short
