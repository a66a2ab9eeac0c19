"""Draw the first images of an epoch and their crops into a PNG, with what was drawn for each.

Takes the flags of pretrain. Those that matter here: --global_crops_size, --global_crops_scale,
--local_crops_size, --local_crops_scale, --local_crops_number, --blur_radius, --seed, --exif and
--value_range.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..config import Config, name_unknown, option
from ..data import dataset
from ..data.augmentation import Augmentation
from ..data.backend_pil import render
from ..data.decode import BadFiles
from ..data.loader import views
from ..data.reader import ImageReader, Met
from ..data.sampler import epoch_order
from ..runtime.terminal import printable, say
from ..runtime.words import counted
from ..validation import check_output, check_outside

# pixels of a picture's place, between places, and lines of text below it
CELL, GAP, LINES = 160, 8, 6
LINE = 12
NAMES = ("brightness", "contrast", "saturation", "hue")


@name_unknown
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
    shown, bad = write(options, Path(options.sheet), options.n_images, options.epoch)
    crops = counted(options.n_crops, "crop")
    say(f"{counted(shown, 'image')} in '{options.sheet}', a row each: the image and its {crops}")
    if bad:
        say(
            f"{counted(len(bad), 'bad file')} replaced by the next image that decodes, as in "
            f"training: {dataset.examples(bad)}"
        )


def write(cfg: Config, path: Path, n_images: int = 4, epoch: int = 0) -> tuple[int, BadFiles]:
    """Draw the first `n_images` of `epoch` and all their crops into a PNG at `path`; the number of
    images shown, and the files that others stand in for.

    They are the crops that a run with these options trains on, made by PIL. Raises ValueError if
    the source holds no images, or none that decodes, or if `path` is a folder, in none, or a file
    that is no earlier sheet.
    """
    check_output("sheet", str(path))
    check_outside("sheet", str(path), cfg.data_path)
    images = dataset.scan(cfg.data_path)
    if images.holds(str(path)):
        raise ValueError(f"`sheet` is '{path}', one of the images: name another file.")
    samples = epoch_order(cfg.seed, epoch, len(images))[:n_images]
    draw = Augmentation(cfg.seed, views(cfg)).draw
    reader, met = ImageReader(images, cfg.given_value_range, cfg.exif), list[Met]()
    columns = 1 + cfg.n_crops
    sheet = Image.new(
        "RGB",
        (columns * (CELL + GAP) + GAP, len(samples) * (CELL + LINES * LINE + 2 * GAP) + GAP),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for row, sample in enumerate(samples.tolist()):
        image, used = reader.decode_next(sample, met)
        bad = [(path, reason) for path, reason, _ in met]
        if image is None:
            raise ValueError(
                f"`data_path` {cfg.data_path} has no image that decodes: {dataset.examples(bad)}."
            )
        plans = draw(epoch, np.array([used])).plan(0, image.height, image.width)
        about = [_name(images.path(used)), f"{image.width} x {image.height}"]
        about += ["boxes: global red, local blue"]
        if used != sample:
            about += [f"in place of {_name(images.path(sample))}"]
        cells = [(_boxes(image, plans), about)]
        cells += [(Image.fromarray(render(image, view)), describe(view)) for view in plans]
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
    return len(samples), bad


def _name(path: str) -> str:
    return printable(Path(path).name)[-26:]


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
