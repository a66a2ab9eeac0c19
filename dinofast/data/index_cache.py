"""The findings of an index pass on disk, beside the run, so that the next pass looks at no file twice."""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import PIL
from PIL import Image

from dinofast.data.findings import NOTHING, Findings
from dinofast.data.names import Names

VERSION = 1  # of the file, and of the rules by which images are refused


def load(path: str, source: str) -> tuple[Names, Findings]:
    """Names and findings of the files that a pass over this source has seen; of none if the cache is not there, is damaged, or
    is of another version or source."""
    try:
        with np.load(path, allow_pickle=False) as file:  # a ZIP, which checks its sums
            if file["header"].tobytes() != _header(source):
                return Names(b""), NOTHING
            names, members, reasons = (Names(file[name].tobytes()) for name in ("names", "members", "reasons"))
            found = Findings(file["stamps"], file["counts"], file["rows"], members, reasons)
    except Exception:  # numpy and zipfile raise all kinds on damaged files; a pass without a cache is merely slower
        return Names(b""), NOTHING
    return (names, found) if len(names) == len(found) else (Names(b""), NOTHING)


def save(path: str, source: str, names: Names, found: Findings) -> None:
    """Written whole or not at all; where it cannot be written, the next pass is as slow as this one."""
    texts = {"names": names.text, "members": found.members.text, "reasons": found.reasons.text, "header": _header(source)}
    unfinished = f"{path}.{os.urandom(4).hex()}.tmp"  # where there are no locks, several may be at it
    with suppress(OSError):
        try:
            with open(unfinished, "xb") as file:
                np.savez(file, stamps=found.stamps, counts=found.counts, rows=found.rows,
                         **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()})
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            with suppress(FileNotFoundError):
                os.remove(unfinished)


def _header(source: str) -> bytes:
    """Pillow is in it because it decides what an image is."""
    return json.dumps({"version": VERSION, "pillow": PIL.__version__, "most_pixels": Image.MAX_IMAGE_PIXELS,
                       "source": os.path.abspath(source)}).encode()


@contextmanager
def turn(path: str, source: str) -> Iterator[bool]:
    """Whether this process is to make the cache of a source at `path`. If another is about it, this one waits for it and gets
    False, or takes its turn if the other has ended without one.

    Where there are no locks, each process makes it.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # then it cannot be written either, but perhaps read
        yield True
        return
    try:
        yield _first(lock, path, source)
    finally:
        os.close(lock)


def _first(lock: int, path: str, source: str) -> bool:
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            fcntl.flock(lock, fcntl.LOCK_SH)  # all that wait go on together
            if _is_of(path, source):
                return False
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(random.uniform(0, 0.05))  # or they would stand in each other's way
    except OSError:  # some network file systems have no locks
        return True


def _is_of(path: str, source: str) -> bool:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["header"].tobytes() == _header(source)
    except Exception:  # as in `load`
        return False
