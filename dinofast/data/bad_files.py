"""The list of bad files beside a run: `bad_files.txt`, a path, a tab and the reason on each
line."""

from __future__ import annotations

import os
from contextlib import suppress

from dinofast.data.decode import BadFiles

IN_A_LINE = str.maketrans({"\n": r"\n", "\r": r"\r", "\t": r"\t"})  # file names may hold anything


def in_a_line(path: str) -> str:
    return path.translate(IN_A_LINE)


class BadFileList:
    """To which all processes of a run add what they meet. Lines are whole; a file that two
    processes meet at the very same time may be listed twice."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listed: set[bytes] = set()
        self._waiting: BadFiles = []  # could not be written yet
        self._read_to = 0  # bytes; what follows was added by others

    def clear(self) -> None:
        """Begin with an empty list, that is, none."""
        with suppress(FileNotFoundError):
            os.remove(self.path)
        self._listed, self._waiting, self._read_to = set(), [], 0

    def known(self) -> frozenset[str]:
        """The paths that it names by now, as `in_a_line` writes them."""
        with suppress(OSError), open(self.path, "rb") as file:
            return frozenset(os.fsdecode(line.partition(b"\t")[0]) for line in file)
        return frozenset()

    def append(self, bad_files: BadFiles) -> None:
        """Add those which the list does not name yet; with the next ones, if that cannot be now."""
        self._waiting += bad_files
        with suppress(OSError):  # a full disk ends no run for the sake of a list
            if self._waiting:
                self._append(self._waiting)
            self._waiting = []

    def _append(self, bad_files: BadFiles) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:
            file.seek(self._read_to)
            others = file.read()
            self._listed |= {line.partition(b"\t")[0] for line in others.splitlines()}
            new = {os.fsencode(in_a_line(path)): reason for path, reason in bad_files}
            lines = b"".join(
                path + b"\t" + os.fsencode(reason) + b"\n"
                for path, reason in new.items()
                if path not in self._listed
            )
            self._read_to += len(others)
            if lines:
                file.write(lines)  # at the end, wherever that is by now
