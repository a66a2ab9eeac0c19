"""Compiled steps: compiled once, found again after a restart, the numbers of eager ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_step import CPU, small
from torch._dynamo.utils import counters

from dinofast import step as step_module

pytestmark = pytest.mark.usefixtures("forget_graphs")


def test_nothing_is_compiled_anew_after_the_first_steps():
    """Full graphs of fixed shapes, two in all: what stochastic depth draws at each step changes
    none."""
    step, batches = small(compile="on", accumulate=2)
    counters.clear()
    for i in range(2):
        step(i, batches)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(2, 6):
            step(i, batches)
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_steps_draw_what_eager_ones_draw():
    runs = []
    for compile in ("off", "on"):
        step, batches = small(compile=compile)
        runs.append([step(i, batches) for i in range(4)])
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_models_that_are_gone_leave_room_for_new_graphs():
    """torch keeps eight graphs of a function, and all compiled modules share one: a session may
    train more than four models."""
    for _ in range(6):
        step, batches = small(compile="on", local_crops_number=1)
        step(0, batches)
        del step
    step, batches = small(compile="on", local_crops_number=1)
    assert all(torch.isfinite(x) for x in step(0, batches).values())


RESTART = """
import json, sys
import test_step
from torch._dynamo.utils import counters
step, batches = test_step.small(compile="on")
losses = [x.item() for x in step(0, batches).values()]
print(json.dumps([losses, dict(counters["inductor"]), dict(counters["aot_autograd"])]))
"""


def test_a_restart_finds_what_was_compiled():
    """In the usual cache, which the tests above have filled with most of it: a cold one takes a
    minute. The first process compiles what is missing, the second nothing."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}"}
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", RESTART],
                env={**environment, "PYTHONHASHSEED": str(seed)},
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
            ).stdout.splitlines()[-1]
        )
        for seed in range(2)
    ]
    assert runs[0][0] == runs[1][0]
    assert runs[1][1]["fxgraph_cache_hit"] > 0 and not runs[1][1].get("fxgraph_cache_miss")
    # of 3: torch 2.13 keeps no graph with autocast in it
    assert runs[1][2]["autograd_cache_hit"] >= 2 and not runs[1][2].get("autograd_cache_miss")


def test_a_compiler_that_fails_is_found_out_before_the_first_step(monkeypatch):
    assert step_module.compiler_unavailable_reason(CPU.device) is None

    def broken(*args, **arguments):
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert (
        step_module.compiler_unavailable_reason(CPU.device)
        == "torch.compile does not work here (no g++)"
    )
