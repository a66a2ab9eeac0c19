"""Files of JSON lines that grow while a run goes on: log.txt with a line an epoch, metrics.jsonl
with one a reading."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any


def set_aside(path: Path) -> None:
    """A file of an earlier run, if there is one, under another name: log.old.txt, log.old1.txt,
    ..."""
    if path.exists():
        names = (
            path.with_name(f"{path.stem}.old{n or ''}{path.suffix}") for n in itertools.count()
        )
        path.replace(next(name for name in names if not name.exists()))


def _write(file: FileIO, data: bytes) -> None:
    """All of it, or `OSError`: on a full disk the first call writes a part and raises nothing."""
    while data:
        data = data[file.write(data) or 0 :]


class JsonLines:
    """Appends to the file; what cannot be written for the moment is kept and written with the next
    line. counter: the key that says how far the run was, such as `epoch`."""

    def __init__(self, path: Path, counter: str) -> None:
        self.path, self.counter = path, counter
        self._waiting = ""

    def drop_from(self, count: float, epoch: int | None = None) -> None:
        """On a resume: lines of this count and later ones are written again, so they must go; also
        a torn last line. Of a new run, with count 0, the file of an earlier one is set aside.

        epoch: lines of those before it stay whatever their count is, and those of later ones go: an
        epoch had another number of steps where batch or images have changed since."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.splitlines() if self._is_before(line, count, epoch)]
        if not kept and count == 0 and text:
            set_aside(self.path)
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def append(self, line: Mapping[str, object]) -> str | None:
        """Why it could not be written yet; None if it was."""
        self._waiting += json.dumps(line) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                begin = file.seek(0, os.SEEK_END)
                try:
                    _write(file, self._waiting.encode())
                except OSError:
                    file.truncate(begin)  # no part of a line that is written again
                    raise
        except OSError as error:
            return error.strerror or str(error)
        self._waiting = ""
        return None

    def read(self) -> list[dict[str, Any]]:
        """The lines so far that are whole."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines if self._count_of(line) < math.inf]

    def values(self, key: str) -> list[float]:
        """What the lines so far say under this key, where it is a number."""
        found = (line.get(key) for line in self.read())
        return [value for value in found if isinstance(value, int | float)]

    def _is_before(self, line: str, count: float, epoch: int | None) -> bool:
        of_line = self._count_of(line, "epoch")
        if epoch is None or of_line in (epoch, math.inf):
            return self._count_of(line) < count
        return of_line < epoch and self._count_of(line) < math.inf

    def _count_of(self, line: str, counter: str = "") -> float:
        try:
            return float(json.loads(line)[counter or self.counter])
        except (ValueError, KeyError, TypeError):
            return math.inf
