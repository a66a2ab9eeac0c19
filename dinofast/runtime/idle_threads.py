"""Torch's threads on a CPU: what they do while they wait for work."""

from __future__ import annotations

import os
import threading

import torch

_sleeper: threading.Thread | None = None


def let_idle_threads_sleep() -> None:
    """Keep torch's OpenMP threads from spinning for long while they wait for work.

    GNU OpenMP lets them spin for milliseconds, which takes the cores from the data workers and from
    anything else that runs: small steps were 8 times as slow on two cores with two other busy
    processes (2026-11-27). OMP_WAIT_POLICY=PASSIVE says so, but is read when torch is imported, too
    late for a function. What counts later is whether there are more threads than cores: then they
    spin a thousandth of that. So a second team of threads is made, which does nothing.

    Without effect where the variable is set, or where torch has one thread or another OpenMP.
    """
    global _sleeper
    if os.environ.get("OMP_WAIT_POLICY") or _sleeper or torch.get_num_threads() == 1:
        return
    ready = threading.Event()
    _sleeper = threading.Thread(
        target=_own_a_team, args=(ready,), name="dinofast-idle", daemon=True
    )
    _sleeper.start()
    ready.wait(1.0)


def _own_a_team(ready: threading.Event) -> None:
    torch.ones(2**20).add_(1)  # large enough that torch takes all threads
    ready.set()
    threading.Event().wait()
