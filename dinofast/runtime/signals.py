"""SIGINT, SIGTERM and SIGHUP: an orderly end of a run instead of a sudden one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from .terminal import launched_rank

# with several processes a wait for a batch is given this long to end by itself, so that all of them
# stop after the same step
GRACE_S = 10.0
# a second SIGINT within this is the same key press: torchrun, which gets it too, sends it on
ONCE_S = 1.0

EARLY = "stopped before the first step; nothing has changed."


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; everything is saved. No `Exception`, which some on the way
    take for a damaged file."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopSignal:
    """SIGINT, SIGTERM and the loss of the terminal ask for an orderly end instead of ending the
    process: `signum` says that one has come, and the loop ends after its step. A second SIGINT ends
    it at once.

    waited_s: for how long the loop has waited for a batch, which may never come; 0 while it does
    not. In such a wait the signal raises `Interrupted`: at once in a process alone, after GRACE_S
    where `several` processes should end together.
    """

    def __init__(self) -> None:
        self.signum = 0
        # before the first step nothing is there to finish: a signal ends it at once
        self.training = False
        self.several = False
        self.waited_s: Callable[[], float] = lambda: 0.0
        self._before: dict[int, object] = {}
        self._since = 0.0  # when the first came
        self._over, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is signal.SIG_IGN:  # nohup, a job in the background
                continue
            try:
                self._before[signum] = signal.signal(signum, self._caught)
            except ValueError:  # not in the main thread: signals are the caller's affair there
                break
        return self

    def _caught(self, signum: int, frame: FrameType | None) -> None:
        if not self.training:
            self.signum = signum  # if what it interrupts makes nothing of it, `begin` does
            raise Interrupted(signum, EARLY)
        again = self.signum and time.monotonic() - self._since > ONCE_S
        if signum == signal.SIGINT and (again or self.signum == signal.SIGTERM):
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
            threading.Thread(target=self._remind, daemon=True).start()
            if launched_rank() == "0":
                twice = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
                text = f"\nstopping: this step is finished and saved first{twice}\n"
                with suppress(OSError):
                    os.write(2, text.encode())
        if self.waited_s() > (GRACE_S if self.several else 0.0):
            raise Interrupted(self.signum, "stopped while it waited for a batch.")

    def begin(self, waited_s: Callable[[], float], several: bool) -> None:
        """From now on a signal waits for the end of a step. Raises `Interrupted` if one has come
        already."""
        if self.signum:
            raise Interrupted(self.signum, EARLY)
        self.waited_s, self.several, self.training = waited_s, several, True

    def _remind(self) -> None:
        """A wait that began, or grew long, after the signal is looked at again."""
        while not self._over.wait(GRACE_S):
            with self._lock:
                if not self._over.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *exc: object) -> None:
        with self._lock:  # no reminder after this, which the process would die of
            self._over.set()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
