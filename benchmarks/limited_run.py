"""One process of `make gpu` that ends in time: told to, then made to, with all its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

MORE = 75  # exit code: something is left; as record.MORE
LEAST_S = 10  # with less no process is begun
INTERRUPTED_S, ABORTED_S = 15, 5  # one that runs over has so long to end when it is told to


class Ended(NamedTuple):
    """code: None if it ran over; how: in words."""

    code: int | None
    how: str

    @property
    def is_finished(self) -> bool:
        """It came to an end of its own, well or not."""
        return self.code is not None and self.code >= 0 and self.code != MORE


def run(
    name: str, arguments: Sequence[str], limit_s: float, environment: dict[str, str], log: Path
) -> Ended:
    """One process of a part, with all that it says in `log` as well. One that runs over is told to
    end, then ended with all its children."""
    if limit_s < LEAST_S:
        return Ended(None, "not begun, no time was left")
    print(f"\n==== {name} (at most {limit_s:.0f} s): {' '.join(arguments)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            arguments,
            cwd=Path(__file__).parent.parent,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        printer = threading.Thread(target=_print, args=(process.stdout, file), daemon=True)
        printer.start()
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            said = _end(process)
            printer.join(ABORTED_S)  # a child of its own session may hold the pipe open
    took = f"{time.monotonic() - start:.0f} s"
    if code is None:
        return Ended(None, f"not finished after {limit_s:.0f} s, {said}: {log} has where it was")
    if code == MORE:
        return Ended(code, f"something is left, {took}")
    return Ended(code, f"ok, {took}" if code == 0 else f"FAILED: exit code {code}, {took}")


def _print(pipe: IO[bytes], log: IO[bytes]) -> None:
    for line in pipe:
        with suppress(ValueError):  # of a log closed meanwhile
            log.write(line)
            log.flush()
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()


def _end(process: subprocess.Popen) -> str:
    """Interrupts what still runs, for Python's traceback; then aborts it, for that of faulthandler,
    which needs no help of the interpreter; then kills the group. What was needed."""
    said = "ended by itself"
    for number, seconds, what in (
        (signal.SIGINT, INTERRUPTED_S, "interrupted"),
        (signal.SIGABRT, ABORTED_S, "aborted"),
    ):
        if process.poll() is not None:
            break
        said = what
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(
                number
            )
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is None:
        said = "killed"
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children too
    process.wait()
    return said
