"""log.txt: a line of JSON an epoch, with the official keys."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class EpochLog:
    """Appends to the file; what cannot be written for the moment is kept and written with the next
    line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""

    def drop_after(self, epoch: int) -> None:
        """On a resume at `epoch`: lines of it and of later epochs are written again, so they must
        go; also a torn last line. A log without a checkpoint is set aside."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.splitlines() if _epoch_of(line) < epoch]
        if not kept and epoch == 0 and text:
            names = (self.path.with_name(f"log.old{n or ''}.txt") for n in itertools.count())
            self.path.replace(next(name for name in names if not name.exists()))
            return
        temporary = self.path.with_name("log.txt.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def values(self, key: str) -> list[float]:
        """What the lines so far say under this key, where it is a number."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = (json.loads(line).get(key) for line in lines if _epoch_of(line) < math.inf)
        return [value for value in found if isinstance(value, int | float)]

    def append(self, line: Mapping[str, object]) -> str | None:
        """Why it could not be written yet; None if it was."""
        self._waiting += json.dumps(line) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._waiting)
        except OSError as error:
            return error.strerror or str(error)
        self._waiting = ""
        return None


def _epoch_of(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf
