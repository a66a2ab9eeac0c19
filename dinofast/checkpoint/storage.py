"""Files as they must be written so that a run can be ended at any moment, on file systems that lack
fsync of folders, hard links or locks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveFailed(OSError):
    """A checkpoint could not be written; what was there before is untouched.

    may_pass: whether a later try can succeed, as on a full disk.
    """

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def write(path: Path, fill: Callable[[IO[bytes]], None], check: Callable[[Path], None]) -> None:
    """`path` with what `fill` writes, in one piece: a temporary file in the same folder, looked at
    by `check`, then a rename. Whatever is raised on the way, the temporary file goes and an earlier
    file stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            _fsync(file.fileno())
        check(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)  # half a file would only fill a full disk
        raise
    _sync_folder(path)


def link(path: Path, name: Path) -> None:
    """A second name for the file just written: a hard link where the file system has them, else a
    copy. Raises `OSError` where there is no room for one."""
    temporary = name.with_name(name.name + ".tmp")
    remove(temporary)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                _fsync(file.fileno())
        os.replace(temporary, name)
    except BaseException:
        remove(temporary)
        raise
    _sync_folder(name)


def remove(path: Path) -> None:
    """Where it is there and can be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a read-only file system
        pass


def reason(error: BaseException) -> OSError | None:
    """The system's error behind one of torch, which tells of a full disk as 'unexpected pos'."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Make the folder, see that it can be written, keep other runs out of it, and remove what a
    killed run left half written. Raises `ValueError` now, not after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"`output_dir` '{folder}' cannot be written ({error.strerror}): choose another."
        ) from error
    with lock:
        try:
            # of this process alone: it ends with it, however it ends
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"another run is writing to `output_dir` '{folder}': wait for it, or choose "
                "another."
            ) from error
        except OSError:
            pass  # a file system without locks: nothing can be known there
        for leftover in (*folder.glob("checkpoint*.pth.tmp"), folder / "best.pth.tmp"):
            remove(leftover)
        yield


def _fsync(descriptor: int) -> None:
    """Errors of the disk count; a file system that cannot do it does not (some FUSE, CIFS,
    VirtualBox)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (*FULL, errno.EIO, errno.EROFS):
            raise


def _sync_folder(path: Path) -> None:
    """The rename itself must survive a power cut, where the file system can promise that. The file
    is in its place: nothing here is an error."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:  # a folder that may be written but not listed
        return
    try:
        os.fsync(folder)
    except OSError:
        pass
    finally:
        os.close(folder)
