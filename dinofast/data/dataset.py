"""Which images: the files of a source by name, in a fixed order. Nothing is read of them here but
the headers of tar shards."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from dinofast.data import shards
from dinofast.data.decode import BadFiles, UnreadableImage, check_length, opened, read_file
from dinofast.data.packed import PackedStrings

WAYS = (
    "give a folder of images or of .tar shards, a shard, a pattern such as "
    "shards-{000000..000146}.tar, or a text file with one path a line."
)
# that list folders, or read headers of shards, and wait for the storage most of the time
THREADS = 16
PROGRESS_EVERY = 10_000  # files

# files scanned so far, and of how many; 0 if that is not known
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageDataset:
    """The images of a source, good and bad, in a fixed order; of each its name, and where it lies
    in its shard.

    root: names are relative to this folder. files: (F,) images and shards. members: of a source
    with shards, else None. fingerprint: equal for the same names, below the source, in the same
    order. bad_files: shards and members that cannot be used, and folders that cannot be listed;
    they are not among the images.
    """

    root: bytes
    files: PackedStrings
    members: Members | None
    fingerprint: str
    bad_files: BadFiles

    def __len__(self) -> int:
        return len(self.files if self.members is None else self.members.file)

    def path(self, i: int) -> str:
        """The name that people see; of a member of a shard, shard.tar/member.jpg."""
        path, members = self._place(i)
        return os.fsdecode(path + b"/" + members.names[i] if members else path)

    def is_file(self, i: int) -> bool:
        """Whether the image is a file of its own and not a member of a shard."""
        return self._place(i)[1] is None

    def read(self, i: int) -> bytes:
        """The whole encoded image. Raises `UnreadableImage`. Threads and forked workers may read at
        the same time."""
        path, members = self._place(i)
        if members is None:
            return read_file(path)
        start, length = members.spans[i].tolist()
        check_length(length)
        with opened(path) as (fd, _):
            data = os.pread(fd, length, start)
        if len(data) < length:
            raise UnreadableImage(shards.PAST_END)
        return data

    def _place(self, i: int) -> tuple[bytes, Members | None]:
        """Path of the file that holds the image, and the members if it is a shard."""
        members = self.members
        if members is None:
            return os.path.join(self.root, self.files[i]), None
        return os.path.join(self.root, self.files[int(members.file[i])]), members if members.spans[
            i, 0
        ] >= 0 else None


@dataclass(frozen=True)
class Members:
    """Where n images lie. file: int32 (n,), which of the files. names: (n,) in their shards, empty
    where the file is the image. spans: int64 (n, 2), first byte in the shard and length, -1 where
    the file is the image."""

    file: np.ndarray
    names: PackedStrings
    spans: np.ndarray


def scan(source: str, on_progress: Progress | None = None) -> ImageDataset:
    """The images of a source: images and shards in a folder, searched to any depth and sorted; one
    shard; what a pattern in braces stands for; the lines of a text file, relative paths starting at
    its folder. The latter in their order.

    Raises `ValueError` if there is no such source, nothing in it, or nothing but bad files.
    """
    bad_files: BadFiles = []
    if os.path.isdir(source):
        root = os.fsencode(os.path.join(source, ""))
        names = PackedStrings.of(_counted(_walk(root, bad_files), on_progress))
        if not len(names) and not bad_files:
            raise ValueError(
                f"`data_path` {source} has no images: none of its files or those below it ends in "
                f"{' '.join((*shards.EXTENSIONS, '.tar'))}. Give a folder that has some."
            )
    else:
        root = os.fsencode(
            os.path.dirname(source.partition("{")[0] if _is_pattern(source) else source)
        )
        root = os.path.join(root, b"") if root else b""
        names = PackedStrings.of(path.removeprefix(root) for path in _named(source, root))
    members = (
        _members(root, names, bad_files, on_progress) if any(map(shards.is_shard, names)) else None
    )
    digest = hashlib.blake2b(names.text.data, digest_size=16)
    for part in (members.file.data, members.names.text.data, members.spans.data) if members else ():
        digest.update(part)
    dataset = ImageDataset(root, names, members, digest.hexdigest(), bad_files)
    if not len(dataset):
        raise ValueError(f"`data_path` {source} has no readable images: {examples(bad_files)}.")
    return dataset


def examples(bad_files: BadFiles) -> str:
    """The first three, with reasons."""
    return "; ".join(f"{path} ({reason})" for path, reason in bad_files[:3]) + (
        "; ..." if len(bad_files) > 3 else ""
    )


def _is_pattern(source: str) -> bool:
    return "{" in source and not os.path.lexists(source)


def _named(source: str, root: bytes) -> Iterable[bytes]:
    """Paths of the files that a shard, a pattern or a text file stands for. Raises `ValueError`."""
    if _is_pattern(source):
        paths = shards.expand(source)
        if missing := [path for path in paths if not os.path.exists(path)]:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise ValueError(
                f"`data_path` {source} stands for {len(paths):,} files, of which {len(missing):,} "
                f"are missing: {', '.join(missing[:3])}{more}; put them there, or name those that "
                "are."
            )
        return map(os.fsencode, paths)
    if os.path.exists(source) and not os.path.isfile(source):
        raise ValueError(f"`data_path` {source} is neither a folder nor a file: {WAYS}")
    try:
        with open(source, "rb") as file:
            if shards.is_shard(os.fsencode(source)):
                return [os.fsencode(source)]
            text = file.read(4096)
            if b"\0" in text:  # before an archive of any size is read
                raise ValueError(
                    f"`data_path` {source} is neither a folder nor a text file nor a .tar: {WAYS}"
                )
            text += file.read()
    except OSError as error:
        raise ValueError(
            f"`data_path` {source} cannot be read ({error.strerror}): {WAYS}"
        ) from error
    lines = [
        line for line in map(bytes.strip, text.removeprefix(b"\xef\xbb\xbf").split(b"\n")) if line
    ]
    if not lines:
        raise ValueError(f"`data_path` {source} lists no images: write one path a line into it.")
    return (os.path.join(root, line) for line in lines)


def _members(
    root: bytes, files: PackedStrings, bad_files: BadFiles, on_progress: Progress | None
) -> Members:
    """Where the images lie, of files some of which are shards; reads the headers of those."""
    at, stopped = [i for i, name in enumerate(files) if shards.is_shard(name)], threading.Event()
    file, names, spans, done = [], bytearray(), [], 0

    def add_files(stop: int) -> None:
        """Those from `done` on, none of which is a shard."""
        file.append(np.arange(done, stop, dtype=np.int32))
        names.extend(b"\0" * (stop - done))
        spans.append(np.full((stop - done, 2), -1))

    with ThreadPoolExecutor(THREADS) as pool:
        tables = pool.map(partial(_table, root, stopped), map(files.__getitem__, at))
        try:
            for i, (own_names, own_spans, bad) in zip(at, tables, strict=True):
                add_files(i)
                file.append(np.full(len(own_spans), i, np.int32))
                names += own_names
                spans.append(own_spans)
                bad_files += bad
                done = i + 1
                if on_progress:
                    on_progress(done, len(files))
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    add_files(len(files))
    return Members(np.concatenate(file), PackedStrings(bytes(names)), np.concatenate(spans))


def _table(
    root: bytes, stopped: threading.Event, name: bytes
) -> tuple[bytes, np.ndarray, BadFiles]:
    """Names and spans of the images in a shard, and what of it is bad; incomplete once `stopped` is
    set."""
    path, names, spans, bad = os.path.join(root, name), [], [], []
    shown = os.fsdecode(path)
    try:
        with opened(path) as (fd, _), open(fd, "rb", buffering=0, closefd=False) as file:
            for member, start, length, reason in shards.images(file):
                if stopped.is_set():
                    break
                if reason:
                    bad.append((f"{shown}/{os.fsdecode(member)}", reason))
                else:
                    names.append(member)
                    spans.append((start, length))
    except UnreadableImage as reason:
        bad.append((shown, str(reason)))
    return b"".join(name + b"\0" for name in names), np.array(spans, np.int64).reshape(-1, 2), bad


# ---- folders
_ENDINGS = tuple(ending.encode() for ending in (*shards.EXTENSIONS, *shards.ENDINGS))


def _walk(root: bytes, bad_files: BadFiles) -> Iterator[bytes]:
    """Names, below `root`, of images and shards in it and in all folders below, sorted. Links are
    followed, but not back to a folder on the way down. A folder that cannot be listed is a bad
    file."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from _below(pool, pool.submit(_list, root), root, b"", (), bad_files)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _below(
    pool: ThreadPoolExecutor,
    listing: Future,
    root: bytes,
    folder: bytes,
    above: tuple[tuple[int, int], ...],
    bad_files: BadFiles,
) -> Iterator[bytes]:
    """The names below a folder of this name, which is being listed. above: the folders on the way
    down to it."""
    try:
        names, here = listing.result()
    except OSError as error:
        bad_files.append((os.fsdecode(root + folder), f"cannot be read: {error.strerror}"))
        return
    if here in above:
        return
    upcoming = (pool.submit(_list, root + folder + name) for name in names if name.endswith(b"/"))
    listings = deque(itertools.islice(upcoming, 2 * THREADS))
    for name in names:
        if name.endswith(b"/"):
            listings.extend(itertools.islice(upcoming, 1))
            yield from _below(
                pool, listings.popleft(), root, folder + name, (*above, here), bad_files
            )
        else:
            yield folder + name


def _list(folder: bytes) -> tuple[list[bytes], tuple[int, int]]:
    """Images, shards and folders in a folder, and which it is. A folder's name is sorted with the
    slash that follows it in the names of its files, so that all names together come out sorted."""
    status = os.stat(folder)
    with os.scandir(folder) as entries:
        names = [entry.name + b"/" if _is_folder(entry) else entry.name for entry in entries]
    return sorted(name for name in names if name.lower().endswith((b"/", *_ENDINGS))), (
        status.st_dev,
        status.st_ino,
    )


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        # a link to an image costs no look at it
        return entry.is_dir(follow_symlinks=not entry.name.lower().endswith(_ENDINGS))
    except OSError:  # a link to itself
        return False


def _counted(names: Iterable[bytes], on_progress: Progress | None) -> Iterator[bytes]:
    done = 0
    for done, name in enumerate(names, 1):
        if on_progress and done % PROGRESS_EVERY == 0:
            on_progress(done, 0)
        yield name
    if on_progress:
        on_progress(done, done)
