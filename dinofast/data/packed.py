"""Millions of file names in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

BLOCK = 4096  # strings cut apart at a time


class PackedStrings:
    """A sequence of byte strings that lie in one, each with a NUL behind it; 9 bytes each beside
    their own.

    Forked workers share its memory; counting references to a million objects would copy them. text:
    uint8, all bytes. ends: int64 (n,), where each NUL is.
    """

    def __init__(self, text: bytes | np.ndarray, ends: np.ndarray | None = None) -> None:
        self.text = np.frombuffer(text, np.uint8)
        self.ends = np.flatnonzero(self.text == 0) if ends is None else ends

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> PackedStrings:
        """A NUL in a string, which no file name has, becomes a question mark."""
        text = bytearray()
        for string in strings:
            text += string.replace(b"\0", b"?") + b"\0"
        return cls(bytes(text))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.text[self._start(i) : self.ends[i]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), BLOCK):
            block = self.text[self._start(start) : self._start(min(start + BLOCK, len(self)))]
            yield from block.tobytes().split(b"\0")[:-1]

    def _start(self, i: int) -> int:
        return int(self.ends[i - 1]) + 1 if i else 0
