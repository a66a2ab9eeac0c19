import resource
import subprocess
import sys

import pytest
import torch

from dinofast import memory

FAULTS = """
import resource, sys, torch
from contextlib import nullcontext
from dinofast.memory import kept_memory
with kept_memory(torch.device("cpu")) if sys.argv[1] == "kept" else nullcontext():
    for i in range(12):
        if i == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**24) for _ in range(4)]                       # 64 MiB each
        del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how, **environment):
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=60,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment})
    return int(done.stdout)


@pytest.mark.skipif(memory._libc() is None, reason="no glibc here, or its malloc is set by the environment")
def test_large_blocks_are_fetched_once():
    assert faults("kept") < 1000 < faults("usual")
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="1000000") > 1000           # somebody has decided otherwise


@pytest.mark.skipif(memory._libc() is None, reason="no glibc here, or its malloc is set by the environment")
def test_memory_goes_back_at_the_end():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    with memory.kept_memory(torch.device("cpu")):
        before = resident()
        blocks = [torch.ones(2**23) for _ in range(8)]                       # 32 MiB each
        del blocks
        assert resident() > before + 200
    assert resident() < before + 50


def test_a_gpu_and_another_malloc_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_libc", lambda: pytest.fail("not asked for"))
    with memory.kept_memory(torch.device("meta")):
        pass
    monkeypatch.setattr(memory, "_libc", lambda: None)
    with memory.kept_memory(torch.device("cpu")):
        pass


def test_peak_memory_is_told():
    assert memory.peak_memory(torch.device("cpu")).endswith(" GiB of this process")
