"""From bytes to an RGB image, why a file cannot be one, and which image stands in for it."""

from __future__ import annotations

import errno
import io
import itertools
import os
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from dinofast.data.dataset import ImageDataset

LARGEST = 2 * 10**9  # bytes of an image: one pread gives no more, and PIL takes none whose pixels need as many
RETRY_PAUSES_S = (0.1, 1.0)  # before a file that could not be read is tried again
UNREAD_IN_A_ROW = 100  # files, after which it is the storage that fails
PROBES = 100  # images tried before it is said that none decodes
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM}

BadFiles = list[tuple[str, str]]  # path, reason


class UnreadableImage(Exception):
    """A file that cannot be used as an image; the message is the reason, in one line."""


class TransientReadError(UnreadableImage):
    """A file that could not be read and may be readable another time: no network, no memory."""


@contextmanager
def unreadable() -> Iterator[None]:
    """Turn whatever PIL raises on a bad file (its plugins raise all kinds) into `UnreadableImage` with a plain reason."""
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
        raise (TransientReadError if isinstance(error, MemoryError) else UnreadableImage)(_line(error)) from error


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())


@contextmanager
def opened(path: str | bytes | os.PathLike[str]) -> Iterator[tuple[int, int]]:
    """Descriptor and length in bytes of a regular file. Raises `UnreadableImage`; a pipe is not waited for."""
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
            raise UnreadableImage("empty file" if not data else "text, not an image" if is_text(data[:256]) else
                                  "wrong header: no image format that PIL knows") from error


def is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\f\r" for byte in head)


def prepare_threads() -> None:
    """To be called before several threads decode: Pillow loads its formats when first needed, which two must not do at a time,
    and its remarks on odd but readable files are heard by all threads or none."""
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes) -> Image.Image:
    """The encoded image as RGB: the first frame of an animation, EXIF orientation ignored (as in the official code).

    16-bit gray keeps its upper eight bits, as PIL itself does with 16-bit color; `convert` would clip it to white at 255.
    Raises `UnreadableImage`, for truncated files and decompression bombs too.
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


class ImageReader:
    """Decoded images of a dataset by index. The next index, cyclically, that decodes stands in for one that does not.

    So what stands in depends on the files alone, not on the process, its threads or the steps before. Only a file that cannot
    be read for the moment (`TransientReadError`) is another matter: it is tried again at once, replaced if that fails too, and
    tried again when its turn comes next. Threads may share one.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self._bad: set[int] = set()  # so that each is decoded once
        self._any_decodes = False

    def decode(self, index: int) -> Image.Image:
        """The image at this index. Raises `UnreadableImage`."""
        for pause_s in RETRY_PAUSES_S:
            try:
                return decode(self.dataset.read(index))
            except TransientReadError:
                time.sleep(pause_s)
        return decode(self.dataset.read(index))

    def decode_next(self, index: int, bad_files: BadFiles) -> tuple[Image.Image | None, int]:
        """The first image from this index on that decodes, and its index; bad files met for the first time are added to
        `bad_files`. No image if none decodes any more, or the storage fails: UNREAD_IN_A_ROW files cannot be read."""
        n, unread, failed = len(self.dataset), 0, 0
        for used in itertools.chain(range(index, n), range(index)):
            if used in self._bad:
                continue
            try:
                image = self.decode(used)
                self._any_decodes = True
                return image, used
            except UnreadableImage as reason:
                bad_files.append((self.dataset.path(used), str(reason)))
                transient = isinstance(reason, TransientReadError)
                unread, failed = unread + 1 if transient else 0, failed + 1
                if not transient:
                    self._bad.add(used)
            if unread == UNREAD_IN_A_ROW or (failed == PROBES and not self._some_decode()):
                break
        return None, index

    def _some_decode(self) -> bool:
        """Whether anything has decoded in this process, or does among PROBES images from all over the dataset."""
        for index in range(0, len(self.dataset), max(1, len(self.dataset) // PROBES)):
            if self._any_decodes:
                return True
            try:
                self.decode(index)
                self._any_decodes = True
            except UnreadableImage:
                pass
        return self._any_decodes
