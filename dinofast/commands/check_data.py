"""Decode every image of a source and say which are bad, and why. A run needs no such check: it
replaces bad images as it meets them. The exit code is 1 if there are bad files.

Remove the bad ones:  dinofast check-data DIR --delete_list bad.txt;  xargs -r -d '\\n' -a bad.txt
rm --
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING

from ..config import option
from ..runtime.image_progress import ImageProgress
from ..runtime.terminal import printable, say
from ..runtime.words import counted
from ..validation import check_output

if TYPE_CHECKING:
    import ctypes

    from ..data.reader import ImageReader

# By processes: 285 images/s and 1.5 ms of CPU an image; by threads, which share the GIL, 235 and
# 1.85 (2 cores, photographs of 93 KB, 2026-11-27).
CHUNK = 64  # images that a worker takes at a time
SHOWN = 10  # bad files of each reason


@dataclass(frozen=True, kw_only=True)
class Options:
    data_path: str = option(MISSING, "images, as for pretrain", metavar="DIR", positional=True)
    delete_list: str = option(
        "",
        "Write the paths of images that were read and do not decode into FILE, one a line: not "
        "those that could not be read, nor members of shards, nor paths with a line break. An "
        "earlier FILE stays until the end.",
        metavar="FILE",
        shown="none",
    )
    value_range: tuple[float, float] = option(
        (0.0, 0.0),
        "as for pretrain: what is black and white in gray of more than 8 bits",
        shown="auto",
    )
    num_workers: int = option(0, "processes", shown="one per core")

    def check(self) -> Options:
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` is {self.num_workers}: give 0 or more.")
        low, high = self.value_range
        if not (low < high or low == high == 0):
            raise ValueError(f"`value_range` is {low:g} {high:g}: give two values, low < high.")
        if self.delete_list:  # so that hours of work do not end with a path that cannot be written
            check_output("delete_list", self.delete_list, is_replaced=True)
            from ..data.names import has_ending
            from ..data.shards import is_shard

            name, there = os.fsencode(self.delete_list), os.path.exists(self.delete_list)
            if there and (has_ending(name) or is_shard(name)):
                raise ValueError(
                    f"`delete_list` is '{self.delete_list}', an image or a shard, which would be "
                    "lost: name another file."
                )
            if there and not os.path.isfile(self.delete_list):
                raise ValueError(
                    f"`delete_list` is '{self.delete_list}', which is no plain file: name one."
                )
            if (
                there
                and os.path.exists(self.data_path)
                and os.path.samefile(self.delete_list, self.data_path)
            ):
                raise ValueError(
                    f"`delete_list` is '{self.delete_list}', the source itself: name another file."
                )
        return self


def run(options: Options) -> int:
    from ..data import dataset
    from ..data.decode import remark
    from ..data.reader import ImageReader
    from ..runtime.backends import cores
    from ..runtime.progress import counting
    from ..runtime.words import spelled

    images = dataset.scan(options.data_path, counting("scanning files", True))
    if options.delete_list and images.holds(options.delete_list):
        raise ValueError(
            f"`delete_list` is '{options.delete_list}', one of the images, which would be lost: "
            "name another file."
        )
    if images.ignored:
        say(images.ignored)
    low, high = options.value_range
    reader = ImageReader(images, (low, high) if low < high else None)
    progress, bad, shades = ImageProgress(len(images)), [], Counter[str]()
    for done, found, own_shades in decode_all(reader, options.num_workers or cores()):
        bad += found
        shades.update(own_shades)
        progress.show(done, len(bad))
    progress.end()
    if dark := remark(shades, len(images) - len(bad)):
        say(spelled(f"warning: {dark}"))
    for path, reason in images.bad_files:
        say(printable(f"{path}: {reason}"))
    say(report([(images.path(i), reason) for i, reason, _ in bad], len(images)))
    if options.delete_list:
        n = write_list(
            options.delete_list,
            [images.path(i) for i, _, deletable in bad if deletable and images.is_file(i)],
        )
        say(f"{counted(n, 'path')} in '{options.delete_list}'")
    return 1 if bad or images.bad_files else 0


def decode_all(
    reader: ImageReader, workers: int
) -> Iterator[tuple[int, list[tuple[int, str, bool]], Counter[str]]]:
    """Decode every image; how many are done, of each bad one its index, the reason, and whether its
    bytes were read, and how many of the others are black or white."""
    global _reader, _stopped

    context = multiprocessing.get_context("fork")
    # shared with the workers
    _reader, _stopped, done = reader, context.Value("b", lock=False), 0
    images = reader.dataset
    chunks = [
        range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)
    ]
    with ProcessPoolExecutor(workers, context, _ignore_interrupts) as pool:
        try:
            for chunk, (bad, shades) in zip(chunks, pool.map(_decode, chunks), strict=True):
                done += len(chunk)
                yield done, bad, shades
        except BrokenProcessPool as error:
            raise OSError(
                "a worker was killed, often for lack of memory: lower `num_workers`."
            ) from error
        except BaseException:
            _stopped.value = 1
            pool.shutdown(cancel_futures=True)
            raise


_reader: ImageReader  # of the workers, from before they are forked
_stopped: ctypes.c_byte


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files


def _decode(indices: range) -> tuple[list[tuple[int, str, bool]], Counter[str]]:
    from ..data.decode import TransientReadError, UnreadableImage, shade

    bad, shades = [], Counter[str]()
    for i in indices:
        if _stopped.value:
            break
        try:
            shades[shade(_reader.decode(i))] += 1
        except UnreadableImage as reason:
            bad.append(
                (i, str(reason), not isinstance(reason, TransientReadError) and _can_be_read(i))
            )
    return bad, shades


def _can_be_read(i: int) -> bool:
    from ..data.decode import UnreadableImage

    try:
        _reader.dataset.read(i)
    except UnreadableImage:
        return False
    return True


def report(bad: list[tuple[str, str]], total: int) -> str:
    """Bad files by reason, the most frequent first, with some paths of each."""
    if not bad:
        return f"all {total:,} images decode" if total > 1 else "the 1 image decodes"
    do = "does" if len(bad) == 1 else "do"
    lines = [f"{len(bad):,} of {counted(total, 'image')} {do} not decode:"]
    for reason, n in Counter(reason for _, reason in bad).most_common():
        lines.append(f"{n:>9,}  {printable(reason)}")
        paths = [path for path, why in bad if why == reason]
        lines += [f"{'':11}{printable(path)}" for path in paths[:SHOWN]] + [
            f"{'':11}and {n - SHOWN:,} more"
        ] * (n > SHOWN)
    return "\n".join(lines)


def write_list(path: str, names: list[str]) -> int:
    """The names, one a line, without those that hold a line break; how many."""
    kept = [name for name in names if "\n" not in name]
    unfinished = f"{path}.tmp"
    with open(unfinished, "wb") as file:
        file.writelines(os.fsencode(name) + b"\n" for name in kept)
    os.replace(unfinished, path)
    return len(kept)
