"""What the index pass finds out about files, in arrays: little memory for millions of them, quickly written and read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinofast.data.names import Names

STAMP = np.dtype([("size", "<i8"), ("mtime_ns", "<i8"), ("inode", "<u8")])
ROW = np.dtype([("start", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4")])


@dataclass(frozen=True)
class Findings:
    """Of F files, each an image or a shard of images, in an order; R images in all.

    stamps: `STAMP` (F,), what tells that a file is still the same; size -1 where nothing can. counts: int32 (F,), images of
    each. rows: `ROW` (R,), where an image lies in its file, in bytes, start -1 for all of it; pixels, 0 if it is refused.
    members: the name of each in its shard, empty where it is the file, or where the shard itself is refused. reasons: of the
    refusal, empty for none.
    """

    stamps: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    members: Names
    reasons: Names

    def __post_init__(self) -> None:
        if not (self.stamps.dtype == STAMP and self.counts.dtype == np.int32 and self.rows.dtype == ROW
                and self.stamps.shape == self.counts.shape and (self.counts >= 0).all()
                and self.rows.shape == (self.counts.sum(),) == (len(self.members),) == (len(self.reasons),)):
            raise ValueError("these arrays do not belong together")  # out of a cache that somebody else wrote

    @classmethod
    def of(cls, stamps: Sequence[tuple[int, int, int]], rows: Sequence[Sequence[tuple]]) -> Findings:
        """rows: of each file (member, start, length, height, width, reason) of each image."""
        flat = [row for file in rows for row in file]
        return cls(np.array(stamps, STAMP), np.array([len(file) for file in rows], np.int32),
                   np.array([row[1:5] for row in flat], ROW), Names.of(row[0] for row in flat),
                   Names.of(os.fsencode(row[5]) for row in flat))

    @classmethod
    def join(cls, parts: Sequence[Findings]) -> Findings:
        parts = [NOTHING, *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("stamps", "counts", "rows")),
                   *(Names(b"".join(getattr(part, name).text for part in parts)) for name in ("members", "reasons")))

    def __len__(self) -> int:
        return len(self.counts)

    def file_of(self) -> np.ndarray:
        """The number of the file of each image, int64 (R,)."""
        return np.repeat(np.arange(len(self)), self.counts)

    def take(self, which: np.ndarray) -> Findings:
        """Of the files of these numbers, int64 (f,), in this order."""
        counts = self.counts[which]
        first = np.cumsum(self.counts) - self.counts  # row of each file
        rows = np.repeat(first[which] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return Findings(self.stamps[which], counts, self.rows[rows], self.members.take(rows), self.reasons.take(rows))


NOTHING = Findings(np.zeros(0, STAMP), np.zeros(0, np.int32), np.zeros(0, ROW), Names(b""), Names(b""))
