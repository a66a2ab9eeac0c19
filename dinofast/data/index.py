"""Which images: finds the files of a source and looks once at each, so that a run knows its images and names the bad ones."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dinofast.data import index_cache, pil, shards
from dinofast.data.findings import NOTHING, STAMP, Findings
from dinofast.data.names import Names
from dinofast.data.pil import Refused, Unread, refusing

END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
CHUNK = 256  # files per task of the pool: keeps its overhead well below a microsecond a file
HEAD, TAIL = 16384, 64  # bytes; two plain reads instead of PIL's many halve the time of threads that wait for each other
LARGEST = 2 * 10**9  # bytes of an image: one pread gives no more, and PIL takes none whose pixels need as many
THREADS = 8  # where files are waited for; where they are not, threads that take the GIL from each other make a file cost three
#              times as much: 120 instead of 40 us (2 cores, page cache, 2026-11-25)
SURE_S = 1.0  # of looking, until it is known which: at first other things, such as handing out the work, hold it up
SETTLED_NS = 10 * 10**9  # a file written later than so long ago may change and keep its time, as clocks are coarse
WAYS = "give a folder of images or of .tar shards, a shard, a pattern such as shards-{000000..000146}.tar, or a text file " \
       "with one path a line."


@dataclass(frozen=True)
class Index:
    """The usable images, in a fixed order. Little memory, and shared by forked workers."""

    files: Names  # F of them
    file: np.ndarray  # int32 (n,): which of them holds each image
    members: Names  # n: name in its shard; empty where the file is the image
    places: np.ndarray  # int64 (n, 2): first byte in its shard and length; -1 where the file is the image
    sizes: np.ndarray  # int32 (n, 2): height and width, pixels
    fingerprint: str  # of the names below the source and the sizes: equal for the same images in the same order

    def __len__(self) -> int:
        return len(self.file)

    def path(self, i: int) -> str:
        """The name that people see; of a member of a shard shard.tar/member.jpg."""
        return _shown(self.files[self.file[i]], self.members[i])

    def read(self, i: int) -> bytes:
        """The whole encoded image. Raises `Refused`. Threads and forked workers may read at the same time."""
        path, (start, length) = self.files[self.file[i]], self.places[i].tolist()
        if start < 0:
            return pil.read(path)
        with refusing(), open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, start)
        if len(data) < length:
            raise Refused(shards.PAST_END)
        return data


def find(source: str) -> Names:
    """The files of a source: images and shards in a folder, searched to any depth and sorted; one shard; what a pattern in
    braces stands for; the lines of a text file, relative paths starting at its folder. The latter in their order.

    Raises `ValueError` if there is no such source, or nothing in it.
    """
    if os.path.isdir(source):
        paths = sorted(_walk(os.fsencode(source)))
        if not paths:
            raise ValueError(f"--data_path {source} holds no images: looked there and in all folders below for files ending in "
                             f"{' '.join((*shards.EXTENSIONS, '.tar'))}; give a folder that has some.")
        return Names.of(paths)
    if "{" in source and not os.path.lexists(source):
        paths = shards.expand(source)
        if missing := [path for path in paths if not os.path.exists(path)]:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise ValueError(f"--data_path {source} stands for {len(paths):,} files, of which {len(missing):,} are missing: "
                             f"{', '.join(missing[:3])}{more}; put them there, or name those that are.")
        return Names.of(map(os.fsencode, paths))
    if os.path.exists(source) and not os.path.isfile(source):
        raise ValueError(f"--data_path {source} is neither a folder nor a file: {WAYS}")
    try:
        with open(source, "rb") as file:
            if shards.is_shard(os.fsencode(source)):
                return Names.of([os.fsencode(source)])
            text = file.read(4096)
            if b"\0" in text:  # before an archive of any size is read
                raise ValueError(f"--data_path {source} is neither a folder nor a text file nor a .tar: {WAYS}")
            text += file.read()
    except OSError as error:
        raise ValueError(f"--data_path {source} cannot be read ({error.strerror}): {WAYS}") from error
    lines = (line.strip() for line in text.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    folder = os.fsencode(os.path.dirname(source))
    names = Names.of(os.path.join(folder, line) for line in lines if line)
    if not len(names):
        raise ValueError(f"--data_path {source} lists no images: write one path a line into it.")
    return names


def _walk(folder: bytes, above: tuple[tuple[int, int], ...] = ()) -> Iterator[bytes]:
    """Paths of images and shards below a folder. Links are followed, but not back to a folder on the way down.

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
        if _is_folder(entry):
            yield from _walk(entry.path, (*above, here))
        elif entry.name.lower().endswith(_ENDINGS):
            yield entry.path


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


_ENDINGS = tuple(ending.encode() for ending in (*shards.EXTENSIONS, *shards.ENDINGS))


def inspect(fd: int, start: int, length: int) -> tuple[int, int]:
    """Height and width in pixels, from the header, of the image in these bytes of an open file. Raises `Refused`.

    A JPEG or PNG without its end marker among the last bytes is decoded to know whether it is truncated or merely odd.
    """
    if length > LARGEST:
        raise Refused(f"{length:,} bytes, too many for an image")
    with refusing():
        head = os.pread(fd, min(length, HEAD), start)
        tail = head[-TAIL:] if length <= HEAD else os.pread(fd, TAIL, start + length - TAIL)
    try:
        image = pil.identify(head)
    except Refused:  # bad, or a header longer than HEAD: all of it decides
        image = pil.identify(_all(fd, start, length))
    width, height = image.size
    if END_MARKERS.get(image.format or "", b"") not in tail:
        pil.decode(_all(fd, start, length))
    return height, width


def _all(fd: int, start: int, length: int) -> bytes:
    with refusing():
        return os.pread(fd, length, start)


def look(path: bytes, stopped: threading.Event) -> tuple[list[tuple], bool]:
    """What `Findings.of` wants to know of the images in a file, and whether it holds until the file changes.

    A shard is left in the middle once `stopped` is set.
    """
    images, holds = [], True
    try:
        with refusing(), open(path, "rb", buffering=0, opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refused("not a regular file")
            if not shards.is_shard(path):
                return [(b"", -1, -1, *inspect(file.fileno(), 0, status.st_size), "")], True
            for member, start, length, reason in shards.images(file):
                if stopped.is_set():
                    return images, False
                size = (0, 0)
                if not reason:
                    try:
                        size = inspect(file.fileno(), start, length)
                    except Refused as refusal:
                        reason, holds = str(refusal), holds and not isinstance(refusal, Unread)
                images.append((member, start, length, *size, reason))
    except Refused as refusal:
        images.append((b"", -1, -1, 0, 0, str(refusal)))
        holds = holds and not isinstance(refusal, Unread)
    return images, holds


def _at_once(path: bytes, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would wait for its writer


def build(source: str, max_refused: float, on_progress: Callable[[int, int], None] | None = None,
          cache: str | None = None) -> tuple[Index, list[tuple[str, str]]]:
    """The index of a source, and (path, reason) of each refused image, or shard if it is damaged.

    `on_progress(files done, all files)` is called now and then. cache: a file that keeps what was found, so that the next time
    only files are looked at that are new or whose size, time of change or inode differ; of several processes that come at the
    same time one looks and the others take it from there.

    Raises `ValueError` if more than the share `max_refused` of the images, or every one of them, is refused.
    """
    files = find(source)
    with index_cache.turn(cache, source) if cache else nullcontext(False) as writes:
        known = index_cache.load(cache, source) if cache else (Names(b""), NOTHING)
        save = (lambda names, found: index_cache.save(cache, source, names, found)) if writes else None
        found = look_at(files, *known, on_progress, save)
    refused_rows = np.flatnonzero(found.rows["height"] == 0)
    file = found.file_of()
    refused = [(_shown(files[file[row]], found.members[row]), os.fsdecode(found.reasons[row])) for row in refused_rows]
    check_share(refused, len(found.rows), max_refused)
    return _index(source, files, found), refused


def look_at(files: Names, known_files: Names, known: Findings, on_progress: Callable[[int, int], None] | None,
            save: Callable[[Names, Findings], None] | None) -> Findings:
    """The findings of these files: what is known of those that have not changed, and a look at each other one.

    save(names, findings) is called at the end if there is anything new, and on the way out of an exception.
    """
    stopped, opened, gate = threading.Event(), threading.Event(), threading.Semaphore(1)
    spent = np.zeros(2)  # seconds, and those of them at work
    total, at, settled = len(files), known_files.find(files), time.time_ns() - SETTLED_NS

    def task(start: int, stop: int) -> tuple[np.ndarray, Findings]:
        """Which files of a chunk are as they are known, bool (stop - start,), and the findings of the others."""
        with gate:
            began, works = time.perf_counter(), time.thread_time()
            result = look_at_chunk(start, stop)
            if not opened.is_set():  # until then one task is here at a time
                spent[:] += time.perf_counter() - began, time.thread_time() - works
                if spent[0] > SURE_S and spent[1] < spent[0] / 2:
                    opened.set()
                    gate.release(THREADS - 1)
        return result

    def look_at_chunk(start: int, stop: int) -> tuple[np.ndarray, Findings]:
        paths = files.cut(start, stop)
        stamps = [_stamp(path, settled) for path in paths]
        same = np.zeros(len(paths), bool)
        listed = np.flatnonzero(at[start:stop] >= 0)
        now = np.array(stamps, STAMP)[listed]
        same[listed] = (now == known.stamps[at[start + listed]]) & (now["size"] >= 0)
        new, rows = [], []
        for i in np.flatnonzero(~same).tolist():
            if stopped.is_set():
                raise CancelledError
            images, holds = look(paths[i], stopped)
            new.append(stamps[i] if holds else UNSETTLED)
            rows.append(images)
        return same, Findings.of(new, rows)

    same, parts, done = np.zeros(total, bool), [], 0

    def found(seen: np.ndarray, same: np.ndarray) -> Findings:
        """Of the files `seen` (f,), of which all that are not `same` (f,) are in `parts`."""
        both = Findings.join([known, *parts])
        return both.take(np.where(same, at[seen], len(known) + np.cumsum(~same) - 1))

    def worth_keeping() -> bool:
        return any((part.stamps["size"] >= 0).any() for part in parts)

    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
        Image.init()  # Pillow loads its formats when first needed, which two threads must not do at a time
        chunks = list(_chunks(files))
        try:
            for (start, stop), (unchanged, new) in zip(chunks, pool.map(task, *zip(*chunks, strict=True)), strict=True):
                parts.append(new)  # first: an interrupt may come between any two of these
                same[start:stop] = unchanged
                done = stop
                if on_progress:
                    on_progress(done, total)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)  # somebody wants to stop: the rest need not be looked at
            if save and worth_keeping():
                same[done:] = at[done:] >= 0  # whether they have changed, the next pass will see
                seen = np.flatnonzero(same | (np.arange(total) < done))
                save(files.take(seen), found(seen, same[seen]))
            raise
    if same.all() and known_files.text == files.text:
        return known
    every = found(np.arange(total), same)
    if save and (worth_keeping() or known_files.text != files.text):
        save(files, every)
    return every


def _chunks(files: Names) -> Iterator[tuple[int, int]]:
    """First file and the one after the last of each task: a shard, or some images."""
    start = 0
    for i, path in enumerate(files):
        shard = shards.is_shard(path)
        if i > start and (shard or i == start + CHUNK):
            yield start, i
            start = i
        if shard:
            yield i, i + 1
            start = i + 1
    if start < len(files):
        yield start, len(files)


UNSETTLED = (-1, 0, 0)


def _stamp(path: bytes, settled: int) -> tuple[int, int, int]:
    """`STAMP` of a file; UNSETTLED if there is none, or if the file could change once more and keep it."""
    try:
        status = os.stat(path)
    except OSError:
        return UNSETTLED
    return (status.st_size, status.st_mtime_ns, status.st_ino) if status.st_mtime_ns < settled else UNSETTLED


def _index(source: str, files: Names, found: Findings) -> Index:
    good, file = found.rows["height"] > 0, found.file_of()
    used = np.bincount(file[good], minlength=len(files)) > 0
    number = (np.cumsum(used) - 1).astype(np.int32)
    rows = found.rows[good]
    files, file, members = files.take(np.flatnonzero(used)), number[file[good]], found.members.take(np.flatnonzero(good))
    sizes = np.stack([rows["height"], rows["width"]], 1)
    folder = source if os.path.isdir(source) else os.path.dirname(source.partition("{")[0])
    below = os.fsencode(os.path.join(folder, ""))
    digest = hashlib.blake2b(digest_size=16)
    for name in files:
        digest.update(name.removeprefix(below) + b"\0")
    for part in (file.tobytes(), members.text, sizes.tobytes()):
        digest.update(part)
    return Index(files, file, members, np.stack([rows["start"], rows["length"]], 1), sizes, digest.hexdigest())


def _shown(file: bytes, member: bytes) -> str:
    return os.fsdecode(file + b"/" + member if member else file)


def check_share(refused: list[tuple[str, str]], total: int, max_refused: float) -> None:
    """Raise `ValueError` if more than the share `max_refused` of `total` images, or every one of them, is refused."""
    if len(refused) > max_refused * total or len(refused) == total:
        first = "; ".join(f"{path} ({reason})" for path, reason in refused[:3])
        raise ValueError(f"{len(refused):,} of {total:,} images are refused and --max_refused is {max_refused:g}: "
                         f"{first}{'; ...' if len(refused) > 3 else ''}. Mend or remove these files.")
