"""Images of any size and frames of videos, in the order in which they are shown."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...data import dataset
from ...data.decode import UnreadableImage, read_file
from ...data.names import has_ending
from ...runtime.terminal import printable, say
from ...runtime.words import first_line

VIDEO_FILES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
READERS = ("av", "imageio.v3")

# of the chosen images, their numbers and what was decoded, or why that failed
Read = Callable[[Collection[int] | None], Iterator[tuple[int, Image.Image | UnreadableImage]]]


@dataclass(frozen=True)
class Frames:
    """names: (N,) below their source, with ending. paths: (N,) as given. is_video: they follow each
    other in time. read: RGB images by number, all or the chosen ones, in order; may be called
    again."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    is_video: bool
    read: Read

    def __len__(self) -> int:
        return len(self.names)


def frames_of(sources: Sequence[str | Path], decode: Callable[[bytes], Image.Image]) -> Frames:
    """The images of files, folders and lists, or the frames of one video file.

    A folder of numbered files without a gap, such as 00000.jpg to 00069.jpg, is a video. decode:
    bytes -> RGB image. Raises `ValueError` where there are none, or no program that reads videos.
    """
    given = [os.fspath(source) for source in sources]
    if films := [path for path in given if path.lower().endswith(VIDEO_FILES)]:
        if len(given) > 1:
            raise ValueError(f"'{films[0]}' is a video and stands among others: give it alone.")
        return _frames_of_file(films[0])
    names, paths, readers = list[str](), list[str](), list[Callable[[], bytes]]()
    for path in given:
        if os.path.isfile(path) and has_ending(os.fsencode(path)):
            names.append(os.path.basename(path))
            paths.append(path)
            readers.append(partial(read_file, path))
            continue
        images = dataset.scan(path)
        if images.ignored:
            say(printable(images.ignored))
        root = os.fsdecode(images.root)
        own = [images.path(i) for i in range(len(images))]
        paths += own
        names += [path.removeprefix(root) for path in own]
        readers += [partial(images.read, i) for i in range(len(images))]

    def read(
        chosen: Collection[int] | None = None,
    ) -> Iterator[tuple[int, Image.Image | UnreadableImage]]:
        for i in range(len(readers)) if chosen is None else sorted(chosen):
            try:
                yield i, decode(readers[i]())
            except UnreadableImage as error:
                yield i, error

    one_folder = len(given) == 1 and os.path.isdir(given[0])
    return Frames(tuple(names), tuple(paths), one_folder and are_numbered(names), read)


def are_numbered(names: Sequence[str]) -> bool:
    """Whether files are numbered without a gap: img_001.png, img_002.png ..."""
    found = [re.fullmatch(r"(.*?)(\d+)\.\w+", name) for name in names]
    parts = [(match[1], int(match[2])) for match in found if match]
    return (
        1 < len(parts) == len(names)
        and len({prefix for prefix, _ in parts}) == 1
        and [number - parts[0][1] for _, number in parts] == list(range(len(parts)))
    )


def _frames_of_file(path: str) -> Frames:
    """Of a video file. It is decoded once to count its frames and once each time they are read."""
    if not os.path.isfile(path):
        raise ValueError(f"`data_path` '{path}' does not exist: give a video or a folder.")
    decoded = _reader(path)
    try:
        n = sum(1 for _ in decoded())
    except Exception as error:  # of a library, of any kind
        raise ValueError(
            f"'{path}' cannot be read as a video ({first_line(error)}): {_by_ffmpeg(path)}"
        ) from error
    if not n:
        raise ValueError(f"'{path}' is a video without frames: give another.")

    def read(
        chosen: Collection[int] | None = None,
    ) -> Iterator[tuple[int, Image.Image | UnreadableImage]]:
        for i, image in enumerate(decoded()):
            if chosen is None or i in chosen:
                yield i, image().convert("RGB")

    names = tuple(f"{i:05}.png" for i in range(n))
    return Frames(names, names, True, read)


def _reader(path: str) -> Callable[[], Iterator[Callable[[], Image.Image]]]:
    """Iterates over a video's frames, which become images when they are called."""
    for name in READERS:
        try:
            library: Any = importlib.import_module(name)
        except ImportError:
            continue
        return lambda: (_by_av if name == "av" else _by_imageio)(library, path)
    raise ValueError(
        f"'{path}' is a video file, which takes PyAV: pip install av, or {_by_ffmpeg(path)}"
    )


def _by_av(av: Any, path: str) -> Iterator[Callable[[], Image.Image]]:
    with av.open(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_image


def _by_imageio(imageio: Any, path: str) -> Iterator[Callable[[], Image.Image]]:
    for array in imageio.imiter(path):
        yield partial(Image.fromarray, array)


def _by_ffmpeg(path: str) -> str:
    return f"write its frames into a folder, ffmpeg -i '{path}' frames/%05d.png, and give that."
