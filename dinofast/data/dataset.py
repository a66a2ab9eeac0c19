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

from dinofast.data import listing, names, shards
from dinofast.data.decode import BadFiles, UnreadableImage, check_length, opened, read_file
from dinofast.data.packed import PackedStrings
from dinofast.runtime.terminal import printable
from dinofast.runtime.words import counted
from dinofast.validation import check_source

WAYS = (
    "give a folder of images or of .tar shards, a shard, a pattern such as "
    "shards-{000000..000146}.tar, or a text file with one path a line."
)
ARCHIVES = (b"PK\3\4", b"PK\5\6", b"7z\xbc\xaf", b"Rar!")
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
    they are not among the images. ignored: what else was left out, and how a list was read, in a
    sentence; "" if there is nothing to tell.
    """

    root: bytes
    files: PackedStrings
    members: Members | None
    fingerprint: str
    bad_files: BadFiles
    ignored: str = ""

    def __len__(self) -> int:
        return len(self.files if self.members is None else self.members.file)

    def path(self, i: int) -> str:
        """The name that people see; of a member of a shard, shard.tar/member.jpg."""
        path, members = self._place(i)
        return os.fsdecode(path + b"/" + members.names[i] if members else path)

    def is_file(self, i: int) -> bool:
        """Whether the image is a file of its own and not a member of a shard."""
        return self._place(i)[1] is None

    def holds(self, path: str) -> bool:
        """Whether this is one of the files that are read, by its name."""
        given = os.fsencode(path)
        ends = {os.path.basename(given), os.path.basename(os.path.realpath(given))}
        return os.path.exists(path) and any(
            os.path.exists(own) and os.path.samefile(own, given)
            for own in (
                os.path.join(self.root, name)
                for name in self.files
                if os.path.basename(name) in ends
            )
        )

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
    ignored, note = names.Ignored(), ""
    if os.path.isdir(source):
        root = os.fsencode(os.path.join(source, ""))
        files = PackedStrings.of(_counted(walk(root, bad_files, ignored), on_progress))
        if not len(files) and not bad_files:
            raise ValueError(f"`data_path` {source} {_no_images(source, ignored)}")
    else:
        root = os.fsencode(
            os.path.dirname(source.partition("{")[0] if _is_pattern(source) else source)
        )
        root = os.path.join(root, b"") if root else b""
        paths, note = _named(source, root)
        files = PackedStrings.of(path.removeprefix(root) for path in paths)
    members = (
        _members(root, files, bad_files, ignored, on_progress)
        if any(map(shards.is_shard, files))
        else None
    )
    digest = hashlib.blake2b(files.text.data, digest_size=16)
    for part in (members.file.data, members.names.text.data, members.spans.data) if members else ():
        digest.update(part)
    told = printable("; ".join(filter(None, (note, str(ignored)))))
    dataset = ImageDataset(root, files, members, digest.hexdigest(), bad_files, told)
    if not len(dataset):
        raise ValueError(f"`data_path` {source} has no readable images: {examples(bad_files)}.")
    return dataset


def _no_images(folder: str, ignored: names.Ignored) -> str:
    """What is wrong with a folder where nothing but these was found, and the way out."""
    if not ignored.files and not ignored.folders:
        what = "holds nothing but empty folders" if os.listdir(folder) else "is an empty folder"
        return f"{what}: give one that has images."
    return (
        f"has no images: none of its files or those below it ends in "
        f"{' '.join((*names.EXTENSIONS, '.tar'))} ({ignored}). Give a folder that has some."
    )


def examples(bad_files: BadFiles) -> str:
    """The first three, with reasons."""
    return "; ".join(f"{printable(path)} ({reason})" for path, reason in bad_files[:3]) + (
        "; ..." if len(bad_files) > 3 else ""
    )


def _is_pattern(source: str) -> bool:
    return "{" in source and not os.path.lexists(source)


def _named(source: str, root: bytes) -> tuple[Iterable[bytes], str]:
    """Paths of the files that a shard, a pattern or a text file stands for, and what is to be told
    of it. Raises `ValueError`."""
    if _is_pattern(source):
        paths = shards.expand(source)
        if missing := [path for path in paths if not os.path.exists(path)]:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise ValueError(
                f"`data_path` {source} stands for {counted(len(paths), 'file')}, of which "
                f"{len(missing):,} {'is' if len(missing) == 1 else 'are'} missing: "
                f"{', '.join(missing[:3])}{more}; put them there, or name those that are."
            )
        return map(os.fsencode, paths), ""
    check_source(source)
    if not os.path.isfile(source):
        raise ValueError(f"`data_path` {source} is neither a folder nor a file: {WAYS}")
    try:
        with open(source, "rb") as file:
            if shards.is_shard(os.fsencode(source)):
                return [os.fsencode(source)], ""
            text = file.read(4096)
            if what := _no_list(source, text):  # before an archive of any size is read
                raise ValueError(f"`data_path` {source} is {what}")
            text += file.read()
    except OSError as error:
        raise ValueError(
            f"`data_path` {source} cannot be read ({error.strerror}): {WAYS}"
        ) from error
    lines, note = listing.paths(text, root, source)
    return (os.path.join(root, line) for line in lines), note


def _no_list(source: str, text: bytes) -> str:
    """What a file is that begins with this and is no list of paths, and the way out; or nothing."""
    name, here = os.fsencode(source), os.path.dirname(source) or "."
    binary = b"\0" in text and not text.startswith(listing.UTF_16)
    if names.has_ending(name) and (binary or not text):
        return f"one image: give a folder of many, such as '{here}' where it lies."
    if name.lower().endswith((b".pth", b".pt", b".ckpt", b".safetensors")):
        return "a file of weights: give the images to train on."
    if text.startswith(ARCHIVES) or name.lower().endswith((b".zip", b".7z", b".rar")):
        return "an archive that is not read: unpack it, and give the folder."
    if text[257:262] == b"ustar":
        return "a tar archive by another name: rename it to end in .tar."
    for magic, how in shards.MAGIC.items():
        if text.startswith(magic):
            return f"compressed with {how}: unpack it first."
    return f"neither a folder nor a text file nor a .tar: {WAYS}" if binary else ""


def _members(
    root: bytes,
    files: PackedStrings,
    bad_files: BadFiles,
    ignored: names.Ignored,
    on_progress: Progress | None,
) -> Members:
    """Where the images lie, of files some of which are shards; reads the headers of those."""
    at, stopped = [i for i, name in enumerate(files) if shards.is_shard(name)], threading.Event()
    file, own, spans, done = [], bytearray(), [], 0

    def add_files(stop: int) -> None:
        """Those from `done` on, none of which is a shard."""
        file.append(np.arange(done, stop, dtype=np.int32))
        own.extend(b"\0" * (stop - done))
        spans.append(np.full((stop - done, 2), -1))

    with ThreadPoolExecutor(THREADS) as pool:
        tables = pool.map(partial(_table, root, stopped), map(files.__getitem__, at))
        try:
            for i, (own_names, own_spans, bad, left_out) in zip(at, tables, strict=True):
                add_files(i)
                file.append(np.full(len(own_spans), i, np.int32))
                own += own_names
                spans.append(own_spans)
                bad_files += bad
                ignored.add(left_out)
                done = i + 1
                if on_progress:
                    on_progress(done, len(files))
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    add_files(len(files))
    return Members(np.concatenate(file), PackedStrings(bytes(own)), np.concatenate(spans))


def _table(
    root: bytes, stopped: threading.Event, name: bytes
) -> tuple[bytes, np.ndarray, BadFiles, names.Ignored]:
    """Names and spans of the images in a shard, what of it is bad, and what is ignored; incomplete
    once `stopped` is set."""
    path, own, spans, bad = os.path.join(root, name), [], [], []
    ignored = names.Ignored()
    shown = os.fsdecode(path)
    try:
        with opened(path) as (fd, _), open(fd, "rb", buffering=0, closefd=False) as file:
            for member, start, length, reason in shards.images(file, ignored):
                if stopped.is_set():
                    break
                if reason:
                    bad.append((f"{shown}/{os.fsdecode(member)}", reason))
                else:
                    own.append(member)
                    spans.append((start, length))
    except UnreadableImage as reason:
        bad.append((shown, str(reason)))
    table = b"".join(name + b"\0" for name in own), np.array(spans, np.int64).reshape(-1, 2)
    return *table, bad, ignored


# ---- folders
def walk(root: bytes, bad_files: BadFiles, ignored: names.Ignored) -> Iterator[bytes]:
    """Names, below `root`, of images and shards in it and in all folders below, sorted. Links are
    followed, but not back to a folder on the way down. What is hidden, or no image by its name, is
    counted in `ignored`. A folder that cannot be listed is a bad file."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from _below(pool, pool.submit(_list, root), root, b"", (), bad_files, ignored)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _below(
    pool: ThreadPoolExecutor,
    listed: Future,
    root: bytes,
    folder: bytes,
    above: tuple[tuple[int, int], ...],
    bad_files: BadFiles,
    ignored: names.Ignored,
) -> Iterator[bytes]:
    """The names below a folder of this name, which is being listed. above: the folders on the way
    down to it."""
    try:
        found, here, left_out = listed.result()
    except OSError as error:
        bad_files.append((os.fsdecode(root + folder), f"cannot be read: {error.strerror}"))
        return
    if here in above:
        return
    ignored.add(left_out)
    upcoming = (pool.submit(_list, root + folder + name) for name in found if name.endswith(b"/"))
    listings = deque(itertools.islice(upcoming, 2 * THREADS))
    for name in found:
        if name.endswith(b"/"):
            listings.extend(itertools.islice(upcoming, 1))
            way = root, folder + name, (*above, here)
            yield from _below(pool, listings.popleft(), *way, bad_files, ignored)
        else:
            yield folder + name


def _list(folder: bytes) -> tuple[list[bytes], tuple[int, int], names.Ignored]:
    """Images, shards and folders in a folder, which it is, and what of it is ignored. A folder's
    name is sorted with the slash that follows it in the names of its files, so that all names
    together come out sorted."""
    status, found, ignored = os.stat(folder), [], names.Ignored()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            # a link to an image costs no look at it
            image = names.has_ending(name) or shards.is_shard(name)
            if _is_folder(entry, not image):
                if names.is_hidden(name):
                    ignored.folders[os.fsdecode(name)] += 1
                else:
                    found.append(name + b"/")
            elif image and not names.is_hidden(name):
                found.append(name)
            else:
                ignored.files[names.kind_of(name)] += 1
    return sorted(found), (status.st_dev, status.st_ino), ignored


def _is_folder(entry: os.DirEntry[bytes], follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
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
