"""Millions of file names in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

BLOCK = 4096  # names cut apart at a time


class Names:
    """A sequence of byte strings that lie in one, each with a NUL behind it.

    Forked workers share its memory; counting references to a million objects would copy them.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 0)  # int64 (n,): where each NUL is

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        return cls(b"".join(name.replace(b"\0", b"?") + b"\0" for name in names))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.text[self._start(i) : self.ends[i]]

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), BLOCK):
            yield from self.cut(start, min(start + BLOCK, len(self)))

    def cut(self, start: int, stop: int) -> list[bytes]:
        """Names start to stop, one by one."""
        return self.text[self._start(start) : self._start(stop)].split(b"\0")[:-1]

    def take(self, which: np.ndarray) -> Names:
        """The names of these numbers, int64 (m,), in this order."""
        if len(which) == len(self) and (which == np.arange(len(self))).all():
            return self
        parts = []
        for block in range(0, len(which), BLOCK):
            at = which[block : block + BLOCK]
            starts = np.where(at > 0, self.ends[at - 1] + 1, 0)
            parts.append(b"".join([self.text[a:b] for a, b in zip(starts.tolist(), (self.ends[at] + 1).tolist(), strict=True)]))
        return Names(b"".join(parts))

    def find(self, other: Names) -> np.ndarray:
        """Where each name of `other` (m,) is in this sequence, int64 (m,); -1 if it is not."""
        if self.text == other.text:
            return np.arange(len(self))
        at = np.full(len(other), -1)
        if len(self) and len(other):
            here, there = (np.fromiter(map(hash, names), np.int64, len(names)) for names in (self, other))
            order = np.argsort(here)
            near = order[np.searchsorted(here, there, sorter=order).clip(max=len(self) - 1)]
            alike = np.flatnonzero(here[near] == there)
            same = [mine == theirs for mine, theirs in zip(self.take(near[alike]), other.take(alike), strict=True)]
            at[alike] = np.where(same, near[alike], -1)  # of two that share a hash one may be missed, never mistaken
        return at

    def _start(self, i: int) -> int:
        return int(self.ends[i - 1]) + 1 if i else 0
