"""SIGINT and SIGTERM: an orderly end of a run instead of a sudden one."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; everything is saved. No `Exception`, which some on the way
    take for a damaged file."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopSignal:
    """SIGINT and SIGTERM ask for an orderly end instead of ending the process; a second SIGINT ends
    it at once."""

    def __init__(self) -> None:
        self.signum = 0
        # before the first step nothing is there to finish: a signal ends it at once
        self.training = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[signum] = signal.signal(signum, self._caught)
            except ValueError:  # not in the main thread: signals are the caller's affair there
                break
        return self

    def _caught(self, signum: int, frame: FrameType | None) -> None:
        if not self.training:
            raise Interrupted(signum, "stopped before the first step; nothing has changed.")
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if os.environ.get("RANK", "0") == "0":
            again = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            os.write(2, f"\nstopping: this step is finished and saved first{again}\n".encode())

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
