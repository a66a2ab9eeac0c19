"""Draw the first images of an epoch and their crops into a PNG, with what was drawn for each. Takes
the flags of pretrain."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..config import Config, option
from ..data import dataset
from ..data.augmentation import Augmentation
from ..data.backend_pil import render
from ..data.decode import UnreadableImage, decode
from ..data.loader import views
from ..data.sampler import epoch_order
from ..runtime.terminal import printable, say
from ..runtime.words import counted
from ..validation import check_output

# pixels of a picture's place, between places, and lines of text below it
CELL, GAP, LINES = 160, 8, 6
LINE = 12
NAMES = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    data_path: str = option(MISSING, "images, as for pretrain", metavar="DIR", positional=True)
    sheet: str = option("crops.png", "the picture", flags=("-o",), metavar="FILE")
    n_images: int = option(4, "images, a row each")
    epoch: int = option(0, "counted from 0")

    def check(self) -> Options:
        for name, least in (("n_images", 1), ("epoch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}: give {least} or more.")
        super().check()
        return self


def run(options: Options) -> None:
    shown = write(options, Path(options.sheet), options.n_images, options.epoch)
    crops = counted(options.n_crops, "crop")
    say(f"{counted(shown, 'image')} in '{options.sheet}', a row each: the image and its {crops}")


def write(cfg: Config, path: Path, n_images: int = 4, epoch: int = 0) -> int:
    """Draw the first `n_images` of `epoch` and all their crops into a PNG at `path`; the number of
    images shown.

    They are the crops that a run with these options trains on, made by PIL. Raises ValueError if
    the source holds no images, or `path` is a folder or in none.
    """
    check_output("sheet", str(path))
    images = dataset.scan(cfg.data_path)
    samples = epoch_order(cfg.seed, epoch, len(images))[:n_images]
    draw = Augmentation(cfg.seed, views(cfg)).draw(epoch, samples)
    columns = 1 + cfg.n_crops
    sheet = Image.new(
        "RGB",
        (columns * (CELL + GAP) + GAP, len(samples) * (CELL + LINES * LINE + 2 * GAP) + GAP),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for row, sample in enumerate(samples.tolist()):
        name = printable(Path(images.path(sample)).name)[-26:]
        try:
            image = decode(images.read(sample), cfg.given_value_range, cfg.exif)
            plans = draw.plan(row, image.height, image.width)
            cells = [
                (
                    _boxes(image, plans),
                    [name, f"{image.width} x {image.height}", "boxes: global red, local blue"],
                )
            ]
            cells += [(Image.fromarray(render(image, view)), describe(view)) for view in plans]
        except UnreadableImage as reason:  # a run would take the next image in its place
            cells = [(Image.new("RGB", (CELL, CELL), "lightgray"), [name, f"bad: {reason}"])]
        top = GAP + row * (CELL + LINES * LINE + 2 * GAP)
        for column, (picture, lines) in enumerate(cells):
            left = GAP + column * (CELL + GAP)
            scale = CELL / max(picture.size)
            shown = picture.resize(
                [max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC
            )
            sheet.paste(shown, (left, top))
            for i, line in enumerate(lines):
                pen.text((left, top + CELL + 2 + i * LINE), line, "black", font)
    sheet.save(path, "PNG")
    return len(samples)


def _boxes(image: Image.Image, plans: np.ndarray) -> Image.Image:
    """The image with the box of each crop."""
    image = image.copy()
    pen, width = ImageDraw.Draw(image), max(1, max(image.size) // 150)
    for i, view in enumerate(plans):
        y, x, h, w = view["box"].tolist()
        pen.rectangle((x, y, x + w - 1, y + h - 1), outline="red" if i < 2 else "blue", width=width)
    return image


def describe(view: np.void) -> list[str]:
    """What was drawn for a view, a fact a line."""
    y, x, h, w = view["box"].tolist()
    lines = [f"{view['size']} px of {w} x {h} at {x}, {y}"]
    if view["jitter"]:
        changes = [
            f"{NAMES[k]} {view['factors'][k]:{'+.2f' if k == 3 else '.2f'}}"
            for k in view["order"].tolist()
        ]
        lines += [", ".join(changes[:2]), ", ".join(changes[2:])]
    last = [
        word
        for word, done in (
            ("mirrored", view["flip"]),
            ("gray", view["gray"]),
            (f"blur {view['blur_radius']:.2f}", view["blur_radius"] > 0),
            ("solarized", view["solarize"]),
        )
        if done
    ]
    return lines + ([", ".join(last)] if last else [])
