"""From bytes to an RGB image, or why a file cannot be one."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from dinofast.data import names
from dinofast.runtime.words import counted

# bytes of an image: one pread gives no more, and PIL takes none whose pixels need as many
LARGEST = 2 * 10**9
LASTING = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.ENXIO,
    errno.EACCES,
    errno.EPERM,
}
# tags of TIFF, EXIF's among them
BITS, PHOTOMETRIC, SAMPLES, ORIENTATION, SAMPLE_FORMAT = 258, 262, 277, 274, 339
WHITE_IS_ZERO, FLOAT = 0, 3
TURNS = {  # what makes an image upright, by its orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_WITHIN = 1 << 17  # bytes: one segment of a JPEG, with others before it
STRIP = 1 << 20  # gray values scaled at a time
FEW, MOST = 4, 0.9  # images below which nothing is said, and the share that is nearly all

BadFiles = list[tuple[str, str]]  # path, reason


class UnreadableImage(Exception):
    """A file that cannot be used as an image; the message is the reason, in one line."""


class TransientReadError(UnreadableImage):
    """A file that could not be read and may be readable another time: no network, no memory."""


@contextmanager
def unreadable() -> Iterator[None]:
    """Turn whatever PIL raises on a bad file (its plugins raise all kinds) into `UnreadableImage`
    with a plain reason."""
    try:
        yield
    except UnreadableImage:
        raise
    except OSError as error:
        if not error.strerror:
            raise UnreadableImage(_line(error)) from error
        kind = UnreadableImage if error.errno in LASTING else TransientReadError
        raise kind(f"cannot be read: {error.strerror}") from error
    except Exception as error:
        raise (TransientReadError if isinstance(error, MemoryError) else UnreadableImage)(
            _line(error)
        ) from error


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())


@contextmanager
def opened(path: str | bytes | os.PathLike[str]) -> Iterator[tuple[int, int]]:
    """Descriptor and length in bytes of a regular file. Raises `UnreadableImage`; a pipe is not
    waited for."""
    with unreadable():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            yield fd, status.st_size
        finally:
            os.close(fd)


def read_file(path: str | bytes | os.PathLike[str]) -> bytes:
    """The bytes of a whole file. Raises `UnreadableImage`."""
    with opened(path) as (fd, length):
        check_length(length)
        return os.pread(fd, length, 0)


def check_length(length: int) -> None:
    """Raise `UnreadableImage` if no image has so many bytes."""
    if length > LARGEST:
        raise UnreadableImage(f"{length:,} bytes, too many for an image")


def identify(data: bytes) -> Image.Image:
    """An image of which PIL has looked at the header alone. Raises `UnreadableImage`."""
    extension = _needs_plugin(data)
    there = not extension or names.has_plugin(extension)
    with unreadable():
        try:
            return Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            reason = "wrong header: no image format that PIL knows"
            if not data:
                reason = "empty file"
            elif not there:
                reason = f"a {extension} file: pip install {names.package(extension)}"
            elif is_text(data[:256]):
                reason = "text, not an image"
            elif data[:4] in (b"II*\0", b"MM\0*"):
                reason = _kind_of_tiff(data)
            raise UnreadableImage(reason) from error


def _needs_plugin(data: bytes) -> str:
    """The ending of what Pillow alone may not read, "" for anything else; whatever the file is
    called."""
    if data[:2] == b"\xff\x0a" or data[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return ".jxl"
    if data[4:8] != b"ftyp":
        return ""
    return ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"


def _kind_of_tiff(data: bytes) -> str:
    """Why PIL does not read what begins as a TIFF: which values it has."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, kinds = tags[BITS], tags.get(SAMPLE_FORMAT, (1,))
        what = "floats" if FLOAT in kinds else "integers"
        return (
            f"a TIFF with {counted(tags.get(SAMPLES, 1), 'band')} of {bits[0]}-bit {what}, which "
            "PIL does not read: save it as 8-bit color or as gray of 8, 16 or 32 bits"
        )
    except Exception:  # damaged, or of another kind
        return "a damaged TIFF, or of a kind that PIL does not read"


def is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\f\r" for byte in head)


def prepare_threads() -> None:
    """To be called before several threads decode: Pillow loads its formats when first needed, which
    two must not do at a time, and its remarks on odd but readable files are heard by all threads or
    none."""
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(
    data: bytes, value_range: tuple[float, float] | None = None, exif: bool = False
) -> Image.Image:
    """The encoded image as RGB of 8 bits: the first frame of an animation, without its alpha.

    Gray of more than 8 bits is scaled by a rule that looks at this file alone: see `levels`, or, if
    it is given, linearly from value_range (lowest, highest) with what lies outside clipped. exif:
    turn the image as its EXIF orientation says, which the official code ignores. Raises
    `UnreadableImage`, for truncated files and decompression bombs too.
    """
    image = identify(data)
    with unreadable():
        turn = TURNS.get(_orientation(image)) if exif else None
        image = rgb(image, value_range)
        return image if turn is None else image.transpose(turn)


def upright(data: bytes, exif: bool) -> Image.Image:
    """The encoded image as it is, turned as its EXIF orientation says where that is to be followed.
    Raises `UnreadableImage`."""
    image = identify(data)
    with unreadable():
        turn = TURNS.get(_orientation(image)) if exif else None
        return image if turn is None else image.transpose(turn)


def rgb(image: Image.Image, value_range: tuple[float, float] | None) -> Image.Image:
    """As `decode`, of an image that is open."""
    if image.mode == "RGB":  # `convert` would copy it
        image.load()
        if image.mode == "RGB":  # as some plugins find out only now
            return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        gray = levels(np.asarray(image), *_declared(image, tags), value_range)
        # Pillow turns it around only where it is of 8 bits
        image = Image.fromarray(255 - gray if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else gray)
    elif image.mode == "La":  # gray times alpha; nothing converts it to RGB at once
        image = image.convert("LA")
    return image.convert("RGB")


def bits_of(image: Image.Image) -> int | None:
    """Of a gray value of more than 8 bits, where the file says so."""
    return _declared(image, getattr(image, "tag_v2", {}))[0]


def _declared(image: Image.Image, tags: Mapping[int, Any]) -> tuple[int | None, bool]:
    """Bits of a gray value, if the file says so, and whether values of 32 bits have no sign."""
    if image.mode != "F" and image.format in (
        "PNG",
        "PPM",
    ):  # in mode I or I;16, by Pillow's version
        return 16, False
    bits, kind = (tags.get(tag, (default,)) for tag, default in ((BITS, 16), (SAMPLE_FORMAT, 1)))
    if image.mode.startswith("I;16"):
        return int(np.min(bits)), False
    return None, image.mode == "I" and int(np.min(kind)) == 1 and bool(tags)


def levels(
    values: np.ndarray,
    bits: int | None = None,
    unsigned: bool = False,
    value_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """Gray values (H, W) of more than 8 bits as levels of 0 to 255, uint8 (H, W).

    bits: of a value, where the format says so (16-bit PNG, PGM, TIFF; 12-bit TIFF): the upper eight
    are kept, as PIL itself does with 16-bit color. Else (float, 32 bits, 16 bits with a sign) by
    the values of the image: floats within 0 to 1 times 255, values within 0 to 255 as they are,
    others from their lowest to their highest. Infinity is the highest or lowest level, what is not
    a number the lowest. value_range: (lowest, highest) instead of any of this. Raises
    `UnreadableImage` where no value is finite.
    """
    if unsigned:
        values = values.view(np.uint32)
    if bits is not None and value_range is None:
        return np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    low, high = value_range or _extent(values)
    if low == high:
        high = low + 1
    out = np.empty(values.shape, np.uint8)
    rows = max(1, STRIP // max(1, values.shape[1]))  # few at a time: they are in float64
    for start in range(0, len(values), rows):
        strip = (values[start : start + rows].astype(np.float64) - low) * (255 / (high - low))
        strip = np.nan_to_num(strip, copy=False, nan=0, posinf=255, neginf=0)
        out[start : start + rows] = np.rint(strip.clip(0, 255))
    return out


def _extent(values: np.ndarray) -> tuple[float, float]:
    """The values that become black and white."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not finite.size:
        raise UnreadableImage("none of its values is finite")
    low, high = float(finite.min()), float(finite.max())
    if low < 0 or high > 255:
        return low, high
    return (0, 1) if high <= 1 and values.dtype.kind == "f" else (0, 255)


def _orientation(image: Image.Image) -> int:
    """Of EXIF, 1 to 8. Pillow itself turns a TIFF; damaged EXIF says nothing."""
    if image.format == "TIFF":
        return 1
    try:
        image.load()  # a PNG may say so behind its pixels
        return image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, struct.error, ValueError, TypeError, KeyError, EOFError):
        return 1


def is_turned(data: bytes) -> bool:
    """Whether `decode` turns a JPEG where it follows EXIF."""
    return b"Exif\0\0" in data[:EXIF_WITHIN] and _orientation(identify(data)) in TURNS


# ---- images of which nothing is left to be seen
def shade(image: Image.Image) -> str:
    """ "black" or "white" if 99 of 100 pixels of an RGB image lie in that quarter of the levels,
    else ""."""
    few = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST).convert("L"))
    low, high = np.percentile(few, (1, 99))
    return "black" if high < 64 else "white" if low > 191 else ""


def remark(shades: Mapping[str, int], n: int) -> str:
    """A sentence if nearly all of n images are black or white by `shade`, else ""."""
    which = max(("black", "white"), key=lambda name: shades.get(name, 0))
    dark = shades.get(which, 0)
    if n < FEW or dark < MOST * n:
        return ""
    return (
        f"{dark:,} of {n:,} images looked at come out nearly {which}: if they are gray of more "
        "than 8 bits, say which values they span, such as `value_range` 0 4095; `dinofast "
        "show-crops` shows them."
    )
