"""Threads that work on images. They wait for the GIL only between the calls that do the work."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

WAIT_S = 2.0  # for all of them, when all is to end


class Threads:
    """Runs work in the order in which it comes; without threads at once. A thread that is stuck
    does not hold up the exit."""

    def __init__(self, n: int) -> None:
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_run, args=(self._work,), name=f"dinofast-crops-{i}", daemon=True
            )
            for i in range(n)
        ]
        for thread in self._threads:
            thread.start()
        # When nobody refers to this any more, and before the interpreter ends: it kills threads
        # that come back from C++ then, and the whole process with them.
        self._finalizer = weakref.finalize(self, _end, self._work, self._threads)

    def close(self) -> None:
        """Drop what has not been begun, and wait for the rest, a few seconds at most."""
        self._finalizer()

    def submit(self, work: Callable, *args: object) -> Future:
        done: Future = Future()
        if self._threads:
            self._work.put((done, work, args))
        else:
            _do(done, work, args)
        return done


def _run(work: queue.SimpleQueue) -> None:
    while (item := work.get()) is not None:
        _do(*item)
        del item  # or the last result would stay as long as the thread waits


def _end(work: queue.SimpleQueue, threads: Sequence[threading.Thread]) -> None:
    with suppress(queue.Empty):
        while True:
            work.get_nowait()
    for _ in threads:
        work.put(None)
    deadline = time.monotonic() + WAIT_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


def _do(done: Future, work: Callable, args: tuple) -> None:
    try:
        done.set_result(work(*args))
    except BaseException as error:  # to be raised where the result is asked for
        done.set_exception(error)
