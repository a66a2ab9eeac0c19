"""What an interrupted `embed` leaves beside its output, and goes on with: finished parts of the
features, and what they were made with."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ...checkpoint.storage import write
from ...data.decode import BadFiles

MADE_WITH, LOCK = "made_with.json", ".lock"
# a part ends after so many images or seconds, whichever comes first, at the end of a batch
PART_IMAGES, PART_S = 16_384, 60.0


class Part(NamedTuple):
    """Images start .. stop - 1: the rows (m,) of those that could be read, and the others."""

    path: Path
    start: int
    stop: int
    rows: np.ndarray
    bad: BadFiles

    def features(self) -> np.ndarray:
        """(m, D). Raises `ValueError` if the file is damaged."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays["features"]
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"'{self.path}' is damaged ({error}): remove it, and the same command makes it "
                "anew."
            ) from error


class FeatureParts:
    """The parts in `folder`, of which those before the first gap count; a context in which no other
    process writes there.

    made_with: what features depend on, in plain values by name. Raises `ValueError` on entering if
    the folder holds parts made with anything else.
    """

    def __init__(self, folder: Path, made_with: dict[str, str]) -> None:
        self.folder, self.made_with = folder, made_with
        self.parts: list[Part] = []
        self._pending: list[tuple[int, np.ndarray, np.ndarray, BadFiles]] = []

    @property
    def done(self) -> int:
        """Images in parts that are written."""
        return self.parts[-1].stop if self.parts else 0

    def __enter__(self) -> FeatureParts:
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock: IO[str] = open(self.folder / LOCK, "w")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"'{self.folder}' cannot be written ({error.strerror}): name another `features`."
            ) from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"another run is writing to '{self.folder}': wait for it, or name another "
                "`features`."
            ) from error
        except OSError:
            pass  # a file system without locks: nothing can be known there
        self._check()
        self._find()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()
        if not any(self.folder.glob("*.npz")):  # nothing is lost
            self.remove()

    def _check(self) -> None:
        """Raise `ValueError` for parts of something else."""
        for leftover in self.folder.glob("*.tmp"):  # of a process that was killed
            leftover.unlink()
        told, there = self.folder / MADE_WITH, {p.name for p in self.folder.iterdir()} - {LOCK}
        if not any(name.endswith(".npz") for name in there) and there <= {MADE_WITH}:
            write(told, self._fill_made_with, lambda path: None)
            return
        try:
            before = json.loads(told.read_text())
        except (OSError, ValueError):
            before = {}
        if not isinstance(before, dict) or not before:
            raise ValueError(
                f"'{self.folder}' is there and holds no parts of features: remove it, or name "
                "another `features`."
            )
        names = [name for name in self.made_with if before.get(name) != self.made_with[name]]
        if names:
            raise ValueError(
                f"'{self.folder}' holds parts of an earlier run with other "
                f"{' and '.join(names)}: remove that folder, or name another `features`."
            )

    def _fill_made_with(self, file: IO[bytes]) -> None:
        file.write(json.dumps(self.made_with, indent=1).encode())

    def _find(self) -> None:
        """The parts up to the first that is missing or damaged; what comes after it is removed."""
        found = sorted(self.folder.glob("*.npz"))
        for path in found:
            numbers = re.fullmatch(r"(\d+)-(\d+)", path.stem)
            if numbers and int(numbers[1]) == self.done:
                try:
                    with np.load(path, allow_pickle=False) as arrays:
                        bad = [(p, why) for p, why in json.loads(str(arrays["bad"]))]
                        part = Part(path, self.done, int(numbers[2]), arrays["rows"], bad)
                        arrays.zip.getinfo("features.npy")
                    self.parts.append(part)
                    continue
                except (zipfile.BadZipFile, ValueError, KeyError, EOFError):
                    pass
            path.unlink()

    def add(self, n: int, rows: np.ndarray, features: np.ndarray, bad: BadFiles) -> None:
        """The next n images: rows (m,) of those read, and their features (m, D)."""
        self._pending.append((n, rows, features, bad))

    @property
    def pending(self) -> int:
        """Images added and not yet written."""
        return sum(n for n, *_ in self._pending)

    def flush(self) -> None:
        """Write what was added, as a part."""
        if not self._pending:
            return
        start, stop = self.done, self.done + self.pending
        rows = np.concatenate([rows for _, rows, _, _ in self._pending])
        made = [features for _, _, features, _ in self._pending if len(features)]
        features = np.concatenate(made) if made else np.empty((0, 0), np.float32)
        bad = [one for _, _, _, own in self._pending for one in own]
        path = self.folder / f"{start:010}-{stop:010}.npz"
        fill = partial(np.savez, rows=rows, features=features, bad=np.array(json.dumps(bad)))
        write(path, fill, lambda path: None)
        self.parts.append(Part(path, start, stop, rows, bad))
        self._pending = []

    def features(self) -> Iterator[np.ndarray]:
        """(m, D) of each part that has any."""
        return (part.features() for part in self.parts if len(part.rows))

    def remove(self) -> None:
        with suppress(OSError):  # what lies there is no longer needed, only in the way
            shutil.rmtree(self.folder)
