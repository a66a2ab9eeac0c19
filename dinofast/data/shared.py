"""One copy of the list of files for all processes of a machine."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from dinofast.data.dataset import ImageDataset
from dinofast.data.packed import PackedStrings
from dinofast.runtime.distributed import local_world

ALIGN = 64  # bytes


def between_ranks(dataset: ImageDataset) -> tuple[ImageDataset, Callable[[], object]]:
    """The dataset in memory that the training processes of this machine share, and what removes the
    file it is mapped from.

    Each process lists the source for itself, which also shows whether all see the same; then the
    first one writes the arrays into a file in the folder for temporary files, and all map it and
    drop their own copy. The file is to be removed once all have come so far; at the latest it goes
    with this process. A process alone, or one that cannot share, keeps its own copy.
    """
    if local_world() < 2:
        return dataset, lambda: None
    path = os.path.join(
        tempfile.gettempdir(), f"dinofast-{os.getuid()}-{dataset.fingerprint}.files"
    )
    members = dataset.members
    own: list[np.ndarray] = [dataset.files.text, dataset.files.ends]
    if members:
        own += [members.file, members.names.text, members.names.ends, members.spans]
    try:
        views = _map(path, own)
    except OSError:  # no room, no permission
        return dataset, lambda: None
    files = PackedStrings(views[0], views[1].view(np.int64))
    if members:
        members = replace(
            members,
            file=views[2].view(np.int32),
            names=PackedStrings(views[3], views[4].view(np.int64)),
            spans=views[5].view(np.int64).reshape(-1, 2),
        )
    shared = replace(dataset, files=files, members=members)
    return shared, weakref.finalize(shared, _remove, path)


def _map(path: str, own: list[np.ndarray]) -> list[np.ndarray]:
    """The same bytes in a file that is mapped into memory, read-only: one uint8 array a part."""
    arrays = [np.frombuffer(part, np.uint8) for part in own]
    starts = np.cumsum([0, *(-(-len(array) // ALIGN) * ALIGN for array in arrays)]).tolist()
    for _ in range(2):
        with (
            suppress(FileNotFoundError),
            open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file,
        ):
            if (
                os.fstat(file.fileno()).st_uid == os.getuid()
                and os.fstat(file.fileno()).st_size == starts[-1]
            ):
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                views = [
                    np.frombuffer(mapped, np.uint8, len(a), at)
                    for a, at in zip(arrays, starts, strict=False)
                ]
                if all(map(np.array_equal, views, arrays)):
                    return views
            raise OSError(f"{path} holds something else")
        _write(path, arrays, starts)
    raise OSError(f"{path} is gone")


def _write(path: str, arrays: list[np.ndarray], starts: list[int]) -> None:
    """Atomically; if another process was first, its file stays."""
    fd, unfinished = tempfile.mkstemp(dir=os.path.dirname(path), prefix="dinofast-")
    try:
        with open(fd, "wb") as file:
            for array, at in zip(arrays, starts, strict=False):
                file.seek(at)
                file.write(array.data)
            file.truncate(starts[-1])
        with suppress(FileExistsError):
            os.link(unfinished, path)
    finally:
        os.remove(unfinished)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.remove(path)
