"""Progress through a set of images: how many are done, how fast, and what is left."""

from __future__ import annotations

import time

from .terminal import StatusLine, is_terminal, say
from .words import counted

SPEAK_S = {True: 0.5, False: 10.0}  # between lines of progress, on a terminal and elsewhere


class ImageProgress:
    """A line now and then, over the one before on a terminal: images done, their rate, what is
    left, and bad files so far.

    first: images that were done before, which are not part of the rate. brief: say nothing of what
    is done at once.
    """

    def __init__(self, total: int, first: int = 0, brief: bool = False) -> None:
        self.total, self.first, self.start = total, first, time.monotonic()
        self.done, self.brief = first, brief
        self.status = StatusLine() if is_terminal() else None
        self.spoken = self.start

    def show(self, done: int, n_bad: int | None = None) -> None:
        from .progress import duration

        now, self.done = time.monotonic(), done
        at_end = done == self.total and not (self.brief and self.spoken == self.start)
        if now - self.spoken < SPEAK_S[self.status is not None] and not at_end:
            return
        self.spoken = now
        rate = self.rate()
        eta = duration((self.total - done) / rate) if rate else "unknown"
        (self.status.show if self.status else say)(
            f"{done:,} of {counted(self.total, 'image')}, {rate:,.0f} images/s, ETA {eta}"
            + ("" if n_bad is None else f", {n_bad:,} bad")
        )

    def rate(self) -> float:
        """Images/s since the beginning."""
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def log(self, text: str) -> None:
        """A line of its own, above that of the progress."""
        (self.status.log if self.status else say)(text)

    def end(self) -> None:
        if self.status:
            self.status.end()
