"""The plan carried out with PIL: the yardstick of every other backend, bit for bit what torchvision does on PIL images.

PIL does the arithmetic; what is fixed here is how it is called. The crop is cut out before it is resized (torchvision's
`resized_crop`): `resize(box=...)` would let pixels outside the box into the border.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError


class Refused(Exception):
    """A file that cannot be used as an image; the message is the reason, in one line."""


class Unread(Refused):
    """A file that could not be read, which may be right another time: no network, no memory, no permission."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn whatever PIL raises on a bad file (its plugins raise all kinds) into `Refused` with a plain reason."""
    try:
        yield
    except Refused:
        raise
    except OSError as error:
        raise (Unread(f"cannot be read: {error.strerror}") if error.strerror else Refused(_line(error))) from error
    except Exception as error:
        raise (Unread if isinstance(error, MemoryError) else Refused)(_line(error)) from error


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def read(path: str | os.PathLike[str]) -> bytes:
    """The whole file. Raises `Refused`."""
    with refusing(), open(path, "rb", buffering=0) as file:
        return file.read()


def identify(data: bytes) -> Image.Image:
    """An image of which PIL has looked at the header alone. Raises `Refused`."""
    with refusing():
        try:
            return Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            raise Refused("empty file" if not data else "text, not an image" if is_text(data[:256]) else
                          "wrong header: no image format that PIL knows") from error


def is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\f\r" for byte in head)


def for_threads() -> None:
    """To be called before several threads decode: Pillow loads its formats when first needed, which two must not do at a time,
    and its remarks on odd but readable files are heard by all threads or none."""
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes) -> Image.Image:
    """The encoded image as RGB: the first frame of an animation, EXIF orientation ignored (as in the official code). Raises
    `Refused`.

    16-bit grey keeps its upper eight bits, as PIL itself does with 16-bit colour; `convert` would clip it to white at 255.
    """
    image = identify(data)
    with refusing():
        if image.mode == "RGB":  # `convert` would copy it
            image.load()
            if image.mode == "RGB":  # as some plugins find out only now
                return image
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def render(image: Image.Image, view: np.void) -> np.ndarray:
    """One crop of an RGB image by one element of the plan (`plan.VIEW`): uint8 (size, size, 3)."""
    crop = cut(image, view["box"].tolist(), int(view["size"]))
    if view["flip"]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view["jitter"]:
        crop = jitter(crop, view["order"].tolist(), view["factors"].tolist())
    if view["grey"]:
        crop = crop.convert("L").convert("RGB")
    if view["blur_radius"] > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(float(view["blur_radius"])))
    if view["solarise"]:
        crop = ImageOps.solarize(crop, 128)
    return np.asarray(crop)


def cut(image: Image.Image, box: list[int], size: int) -> Image.Image:
    """The box (y, x, height, width), resized to a square by PIL's antialiased bicubic."""
    y, x, h, w = box
    return image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)


def jitter(image: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    """Brightness 0, contrast 1, saturation 2 and hue 3 in the given order, each with its factor."""
    for operation in order:
        image = _COLOUR[operation](image, factors[operation])
    return image


def _hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by this share of the circle, in the 8-bit steps of PIL's HSV, rounded towards 0 as torchvision does."""
    hue, saturation, value = image.convert("HSV").split()
    step = int(turn * 255)
    hue = hue.point([(level + step) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_COLOUR = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    _hue,
)
