"""Threads that work on images. They wait for the GIL only between the calls that do the work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

WAIT_S = 2.0  # for a thread, when all is to end


class Threads:
    """Runs work in the order in which it comes; without threads at once. A thread that is stuck does not hold up the exit."""

    def __init__(self, n: int) -> None:
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"dinofast-crops-{i}", daemon=True) for i in range(n)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable, *args: object) -> Future:
        done: Future = Future()
        if self._threads:
            self._work.put((done, work, args))
        else:
            _do(done, work, args)
        return done

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            _do(*item)

    def close(self) -> None:
        """Drop what has not been begun, and wait for the rest, a few seconds at most."""
        with suppress(queue.Empty):
            while True:
                self._work.get_nowait()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(WAIT_S)


def _do(done: Future, work: Callable, args: tuple) -> None:
    try:
        done.set_result(work(*args))
    except BaseException as error:  # to be raised where the result is asked for
        done.set_exception(error)
