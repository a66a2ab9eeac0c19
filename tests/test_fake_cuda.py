"""What can be known of a GPU's step without a GPU: on fake CUDA tensors, and by the schedule that
Inductor makes for an H100."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dinofast.config import Config

HERE = Path(__file__).parent / "fake_cuda"

# Of Config, what changes neither tensors nor operators of a step: sizes, schedules, data and files.
NOT_OF_A_STEP = set(
    """
    out_dim momentum_teacher head_hidden_dim head_bottleneck_dim warmup_teacher_temp
    teacher_temp warmup_teacher_temp_epochs student_temp center_momentum weight_decay
    weight_decay_end batch_size_per_gpu epochs freeze_last_layer lr warmup_epochs min_lr
    global_crops_scale local_crops_scale blur_radius image_mean image_std data_path output_dir
    saveckp_freq saveckp_steps log_steps max_bad_files seed num_workers data_backend
    hw_decoder_load device dist_url local_rank value_range exif
    preset config init eval_data eval_every tensorboard wandb in_channels
    """.split()
)
# Tested elsewhere: compiling is the other half of these tests, oneDNN is for a CPU, and a graph
# cannot be captured of nothing.
ELSEWHERE = {"compile", "linear", "cuda_graph"}

# GiB and kernels of Inductor's own of student and teacher, ViT-S/16, 128 images of 2 x 224 and 8 x
# 96, bf16. A change that needs fewer bytes lowers the number here; one that needs more is a
# regression. By the torch that the schedule is of.
BUDGET = {(2, 13): {"teacher": (8.29, 42), "student": (16.39, 45), "backward": (32.92, 277)}}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_step_runs_with_every_option(fake_cuda, mode):
    found = fake_cuda("steps.py", mode)
    failed = {case: how for case, how in found.items() if not how.startswith("attention ")}
    assert not failed and len(found) == (26 if mode == "eager" else 10)
    for case, how in found.items():
        assert how.endswith("not compiled" if mode == "eager" else ", compiled")
        if asked := ast.literal_eval(case).get("attention"):
            assert how.startswith(f"attention {asked}")


def test_no_option_is_forgotten():
    """A new option is tried above, or is named here as none of a step."""
    tried, compiled = (set().union(*map(set, _cases(name))) for name in ("CASES", "COMPILED"))
    assert tried - compiled == {
        "optimizer",
        "clip_mode",
        "clip_grad",
        "accumulate",
        "arch",
        "patch_size",
        "global_crops_size",
    }
    assert tried | NOT_OF_A_STEP | ELSEWHERE == {f.name for f in fields(Config)} and not tried & (
        NOT_OF_A_STEP | ELSEWHERE
    )


def _cases(name):
    """Of steps.py, which can only be imported where the device is."""
    named = [
        node
        for node in ast.parse((HERE / "steps.py").read_text()).body
        if isinstance(node, ast.AnnAssign)
    ]
    return next(ast.literal_eval(node.value) for node in named if node.target.id == name)


FAULTS = {
    "eager": {
        "device": "on the same device",
        "item": "DataDependentOutputException",
        "cpu": "HostRead",
        "fake": "UnsupportedOperatorException: planted.op",
    },
    "compiled": {
        "device": "on the same device",
        "item": "DataDependentOutputException",
        "break": "graph_break",
        "fake": "unsupported operator: planted.op",
    },
}


@pytest.mark.parametrize("mode", FAULTS)
def test_planted_faults_are_found(fake_cuda, mode):
    """Tensors on two devices, the host waiting for the device, an operator without a fake, and a
    graph break."""
    found = fake_cuda("steps.py", mode, *FAULTS[mode])
    for fault, message in FAULTS[mode].items():
        assert message in found[fault] and not found[fault].startswith("attention"), found


def test_bytes_and_kernels_of_a_step(fake_cuda):
    if torch.cuda.is_available():
        pytest.skip(
            "a GPU is here, and the schedule asked for is an H100's: the budget is held where "
            "there is none"
        )
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version not in BUDGET:
        pytest.skip(f"no budget for torch {torch.__version__}: its Inductor fuses differently")
    graphs = fake_cuda("schedule.py")
    for name, (gib, kernels) in BUDGET[version].items():
        graph = graphs[name]
        assert 0.995 * gib < graph["gib"] < 1.005 * gib and graph["kernels"] == kernels, (
            name,
            graph,
        )
    assert sum(graph["library_calls"] for graph in graphs.values()) == 339
