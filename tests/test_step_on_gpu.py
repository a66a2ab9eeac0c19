"""Whole steps on a GPU: the official trajectory, replayed graphs, no wait for the device."""

import pytest
import torch
from test_step import assert_official, golden_step, small

from dinofast.runtime.distributed import Process

pytestmark = pytest.mark.usefixtures("forget_graphs")

GPU = Process(0, 1, torch.device("cuda", 0)) if torch.cuda.is_available() else None


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": "off"},
        {"compile": "on"},
        {"compile": "off", "cuda_graph": True},
        {"compile": "on", "cuda_graph": True},
        {"compile": "on", "grad_checkpointing": True},
    ],
    ids=str,
)
def test_official_trajectory_on_a_gpu(gpu, changes):
    step = golden_step(GPU, precision="fp32", **changes)
    assert_official(step, step.model, "cuda", tolerance=1e-4)
    assert (step.graph is not None) == changes.get("cuda_graph", False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_replayed_step_is_an_eager_step(gpu, precision):
    runs = []
    for graph in (False, True):
        step, batches = small(GPU, cuda_graph=graph, compile="off", precision=precision)
        # a replay writes into the tensors of the one before
        runs.append([{k: v.clone() for k, v in step(i, batches).items()} for i in range(8)])
        assert step.graph is None or step.graph._graph is not None
    # of fp16 the first steps are skipped: their gradients are not finite until the scale fits
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": "off"},
        {"compile": "on"},
        {"cuda_graph": True},
        {"precision": "fp16"},
        {"precision": "fp32"},
        {"residual_precision": "bf16"},
        {"teacher_precision": "bf16"},
        {"grad_checkpointing": True},
        {"attention": "sdpa"},
    ],
    ids=str,
)
def test_no_step_waits_for_the_gpu(gpu, changes):
    step, batches = small(GPU, **changes)
    crops = [next(batches) for _ in range(10)]
    for i in range(6):  # compiles, records, makes what is made once
        step(i, iter(crops[i:]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(6, 10):
            step(i, iter(crops[i:]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
