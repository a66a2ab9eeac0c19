import subprocess
import sys

import pytest
import torch

from dinofast.runtime import memory

FAULTS = """
import resource, sys, torch
from contextlib import nullcontext
from dinofast.runtime.memory import retain_freed_memory

def now():
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt, resident

start = now()
with retain_freed_memory(torch.device("cpu")) if sys.argv[1] == "kept" else nullcontext():
    for i in range(12):
        if i == 4:
            warm = now()
        blocks = [torch.ones(2**24) for _ in range(4)]                       # 64 MiB each
        del blocks
    last = now()
print(last[0] - warm[0], last[1] - start[1], now()[1] - start[1])
"""


def measured(how, **environment):
    """Page faults of eight rounds, and MiB more than at the start, at the end of the rounds and
    after it."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment},
    )
    return map(int, done.stdout.split())


@pytest.mark.skipif(
    memory._libc() is None, reason="no glibc here, or its malloc is set by the environment"
)
def test_large_blocks_are_fetched_once_and_go_back_at_the_end():
    faults, kept, after = measured("kept")
    assert faults < 1000 and kept > 200 and after < 50
    faults, kept, _ = measured("usual")
    assert faults > 1000 and kept < 100
    # somebody has decided otherwise
    faults, _, _ = measured("kept", MALLOC_TRIM_THRESHOLD_="1000000")
    assert faults > 1000


def test_a_gpu_and_another_malloc_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_libc", lambda: pytest.fail("not asked for"))
    with memory.retain_freed_memory(torch.device("meta")):
        pass
    monkeypatch.setattr(memory, "_libc", lambda: None)
    with memory.retain_freed_memory(torch.device("cpu")):
        pass


def test_peak_memory_is_told():
    assert memory.peak_memory(torch.device("cpu")).endswith(" GiB of this process")


@pytest.mark.parametrize(
    ("free", "wanted", "each", "fitting"),
    [
        (64, 10, 4, 10),
        (64, 16, 4, 14),
        (64, 10, 30, 1),
        (64, 10, 70, 0),
        (0, 3, 1, 0),
        (64, 0, 9, 0),
    ],
)
def test_no_more_workers_than_shared_memory_holds(monkeypatch, free, wanted, each, fitting):
    """In MiB. One worker's share is left for what has been taken."""
    usage = type("usage", (), {"free": free * 2**20})
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage)
    n, why = memory.fewer_workers(wanted, each * 2**20)
    assert n == fitting and (why is None) == (n == wanted)
    if why:
        assert f"{free} MiB free" in why and "--shm-size" in why and why.endswith(".")
        assert ("none starts" if not n else f"only {n} start") in why


def test_without_such_a_folder_all_workers_start(monkeypatch):
    monkeypatch.setattr(memory, "SHARED_MEMORY", "/no/such/folder")
    assert memory.fewer_workers(8, 2**40) == (8, None)
