"""Which files: finds the images of a source and looks once at each, so that a run knows its images and names the bad ones."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dinofast.data.pil import Refused, decode, identify, read, refusing

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
CHUNK = 256  # files per task of the pool: keeps its overhead well below a microsecond a file
HEAD, TAIL = 16384, 64  # bytes; two plain reads instead of PIL's many halve the time of threads that wait for each other
THREADS = 8  # they hide the latency of network storage


@dataclass(frozen=True)
class Index:
    """The usable images, in a fixed order.

    Paths lie in one byte string, whose memory forked workers share; counting references to a million `str` would copy them.
    """

    paths: bytes
    ends: np.ndarray  # int64 (n,): end of each path in `paths`
    sizes: np.ndarray  # int32 (n, 2): height and width, pixels
    fingerprint: str  # of the names below the source and the sizes: equal for the same images in the same order

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, i: int) -> str:
        """The name that people see."""
        return os.fsdecode(self.paths[self.ends[i - 1] if i else 0 : self.ends[i]])

    def read(self, i: int) -> bytes:
        """The whole encoded file. Raises `Refused`."""
        return read(self.path(i))


def find(source: str) -> list[str]:
    """Paths of the images of a source: a folder, searched to any depth and sorted, or a text file with one path a line, in its
    order, relative paths starting at the text file's folder. Raises `ValueError` if there is no such source or no image in it.
    """
    if os.path.isdir(source):
        paths = sorted(_walk(source))
        if not paths:
            raise ValueError(f"--data_path {source} holds no images: looked there and in all folders below for files ending in "
                             f"{' '.join(EXTENSIONS)}; give a folder that has some.")
        return paths
    if os.path.exists(source) and not os.path.isfile(source):
        raise ValueError(f"--data_path {source} is neither a folder nor a file: give a folder of images, or a text file with "
                         "one image path a line.")
    try:
        with open(source, "rb") as file:
            text = file.read(4096)
            if b"\0" in text:  # before an archive of any size is read
                raise ValueError(f"--data_path {source} is neither a folder nor a text file: give a folder of images, or a "
                                 "text file with one image path a line.")
            text += file.read()
    except OSError as error:
        raise ValueError(f"--data_path {source} cannot be read ({error.strerror}): give a folder of images, or a text file "
                         "with one image path a line.") from error
    lines = (line.strip() for line in text.decode("utf-8-sig", "surrogateescape").split("\n"))
    paths = [os.path.join(os.path.dirname(source), line) for line in lines if line]
    if not paths:
        raise ValueError(f"--data_path {source} lists no images: write one path a line into it.")
    return paths


def _walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Image paths below a folder. Links are followed, but not back to a folder on the way down.

    A folder that cannot be listed is given out as if it were an image, to be refused by name.
    """
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError:
        yield folder
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, (*above, here))
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry.path


def inspect(path: str) -> tuple[int, int]:
    """Height and width in pixels, from the header. Raises `Refused`.

    A JPEG or PNG without its end marker among the last bytes is decoded to know whether it is truncated or merely odd.
    """
    with refusing():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refused("not a regular file")  # opening a pipe would wait for its writer
    with refusing(), open(path, "rb", buffering=0) as file:
        head = file.read(HEAD)
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        tail = file.read(TAIL)
    try:
        image = identify(head)
    except Refused:  # bad, or a header longer than HEAD: the whole file decides
        image = identify(read(path))
    width, height = image.size
    if END_MARKERS.get(image.format or "", b"") not in tail:
        decode(read(path))
    return height, width


def build(
    source: str, max_refused: float, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Index, list[tuple[str, str]]]:
    """The index of a source, and (path, reason) of each refused file. `on_progress(done, total)` is called now and then.

    Raises `ValueError` if more than the share `max_refused` of the files, or every one of them, is refused.
    """
    paths = find(source)
    total = len(paths)

    def look(start: int) -> list[tuple[int, int] | str]:
        found: list[tuple[int, int] | str] = []
        for path in paths[start : start + CHUNK]:
            try:
                found.append(inspect(path))
            except Refused as reason:
                found.append(str(reason))
        return found

    found: list[tuple[int, int] | str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
        Image.preinit()
        try:
            for part in pool.map(look, range(0, total, CHUNK)):
                found += part
                if on_progress:
                    on_progress(len(found), total)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # somebody wants to stop: the rest need not be looked at
            raise
    refused = [(path, size) for path, size in zip(paths, found, strict=True) if isinstance(size, str)]
    check_share(refused, total, max_refused)
    good = [(os.fsencode(path), size) for path, size in zip(paths, found, strict=True) if not isinstance(size, str)]
    ends = np.cumsum([len(path) for path, _ in good], dtype=np.int64)
    sizes = np.array([size for _, size in good], np.int32)
    below = os.fsencode(os.path.join(source, ""))
    digest = hashlib.blake2b(b"\0".join(path.removeprefix(below) for path, _ in good) + sizes.tobytes(), digest_size=16)
    return Index(b"".join(path for path, _ in good), ends, sizes, digest.hexdigest()), refused


def check_share(refused: list[tuple[str, str]], total: int, max_refused: float) -> None:
    """Raise `ValueError` if more than the share `max_refused` of `total` files, or every one of them, is refused."""
    if len(refused) > max_refused * total or len(refused) == total:
        first = "; ".join(f"{path} ({reason})" for path, reason in refused[:3])
        raise ValueError(f"{len(refused):,} of {total:,} images are refused and --max_refused is {max_refused:g}: "
                         f"{first}{'; ...' if len(refused) > 3 else ''}. Mend or remove these files.")
