"""From bytes to an RGB image, or why a file cannot be one."""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

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
    with unreadable():
        try:
            return Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            raise UnreadableImage(
                "empty file"
                if not data
                else "text, not an image"
                if is_text(data[:256])
                else "wrong header: no image format that PIL knows"
            ) from error


def is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\f\r" for byte in head)


def prepare_threads() -> None:
    """To be called before several threads decode: Pillow loads its formats when first needed, which
    two must not do at a time, and its remarks on odd but readable files are heard by all threads or
    none."""
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes) -> Image.Image:
    """The encoded image as RGB: the first frame of an animation, EXIF orientation ignored (as in
    the official code).

    16-bit gray keeps its upper eight bits, as PIL itself does with 16-bit color; `convert` would
    clip it to white at 255. Raises `UnreadableImage`, for truncated files and decompression bombs
    too.
    """
    image = identify(data)
    with unreadable():
        if image.mode == "RGB":  # `convert` would copy it
            image.load()
            if image.mode == "RGB":  # as some plugins find out only now
                return image
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
