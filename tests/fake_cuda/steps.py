"""Whole steps on fake CUDA tensors: no GPU and no memory, but every shape, dtype, device and
operator of a real one.

    python steps.py eager | compiled [FAULT ...]    prints JSON: what each takes, or how it failed

Found so: tensors on different devices, a host that reads what is on the device, an operator without
a fake implementation, a graph break. Each FAULT plants one of these, and the first case alone is
run with it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import device
import torch
from device import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

device.enter()

from dinofast import loss
from dinofast import step as step_module
from dinofast.config import Config
from dinofast.nn import attention, head, packing
from dinofast.nn.dino import Model
from dinofast.runtime.distributed import Process
from dinofast.schedule import Schedule

CASES: list[dict[str, Any]] = [
    {},
    {"attention": "xformers"},
    {"attention": "varlen"},
    {"attention": "fa3"},
    {"attention": "cudnn"},
    {"attention": "sdpa"},
    {"attention": "eager"},
    {"precision": "fp16"},
    {"precision": "fp32"},
    {"residual_precision": "bf16"},
    {"teacher_precision": "bf16"},
    {"teacher_precision": "bf16", "residual_precision": "bf16"},
    {"grad_checkpointing": True},
    {"drop_path_rate": 0.0},
    {"use_bn_in_head": True},
    {"norm_last_layer": False},
    {"head_layers": 1},
    {"use_fp16": False},
    {"local_crops_number": 0},
    {"local_crops_size": 32},
    {"optimizer": "sgd"},
    {"optimizer": "lars"},
    {"clip_mode": "global"},
    {"clip_grad": 0.0},
    {"accumulate": 2},
    {"arch": "vit_small", "patch_size": 16, "global_crops_size": 224},
]
# Fewer, as compiling takes long: each option once, but for those that lie outside the graphs of
# student and teacher.
COMPILED: list[dict[str, Any]] = [
    {},
    {"attention": "varlen"},
    {"attention": "fa3", "precision": "fp16"},
    {"attention": "cudnn", "local_crops_size": 32},
    {"attention": "sdpa", "drop_path_rate": 0.0, "head_layers": 1},
    {"attention": "eager", "use_bn_in_head": True},
    {"use_fp16": False, "norm_last_layer": False},
    {"residual_precision": "bf16", "local_crops_number": 0},
    {"teacher_precision": "bf16", "residual_precision": "bf16"},
    {"grad_checkpointing": True},
]


class HostRead(Exception):
    """Something on the device was read by the host."""


class NoHostReads(TorchDispatchMode):
    """Fake tensors refuse `.item()`; `.cpu()` and its like wait for the device as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # which argument is read
        copies = {torch.ops.aten.copy_.default: 1, torch.ops.aten._to_copy.default: 0}
        source = args[copies[func]] if func in copies else None
        if source is not None and source.device.type == "cuda" and out.device.type == "cpu":
            raise HostRead(f"{func} of {tuple(source.shape)}")
        return out


# what a step goes through, and what becomes of its result
FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "device": (packing, "resampling", lambda matrix: torch.empty_like(matrix, device="cpu")),
    "item": (loss.DINOLoss, "step", lambda stats: stats if stats.loss.item() else stats),
    "cpu": (loss.DINOLoss, "step", lambda stats: stats if stats.loss.cpu() is None else stats),
    "fake": (head.DINOHead, "forward", lambda x: torch.ops.planted.op(x)),
    "break": (head.DINOHead, "forward", lambda x: [torch._dynamo.graph_break(), x][1]),
}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    owner, name, spoil = FAULTS[fault]
    usual = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: spoil(usual(*args, **options)))
    try:
        yield
    finally:
        setattr(owner, name, usual)


def run(
    changes: dict[str, Any], backend: str | Callable | None, images: int = 4, steps: int = 2
) -> str:
    """What does the work, in the words of Step; raises whatever goes wrong."""
    torch._dynamo.reset()
    options = {
        "arch": "vit_nano",
        "patch_size": 4,
        "global_crops_size": 32,
        "local_crops_size": 16,
        "out_dim": 512,
        "head_hidden_dim": 64,
        "head_bottleneck_dim": 32,
        "drop_path_rate": 0.2,
        "local_crops_number": 4,
        **changes,
    }
    cfg = Config(
        batch_size_per_gpu=images,
        device="cuda",
        compile="on" if backend else "off",
        freeze_last_layer=1,
        **options,
    ).check()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        contextlib.nullcontext() if backend else NoHostReads(),
    ):
        with torch.device(DEVICE):
            model = Model.from_config(cfg)
        object.__setattr__(model, "to", lambda *args, **options: model)  # it is there
        object.__setattr__(model.teacher, "to", lambda dtype: convert(model.teacher, dtype))
        step = step_module.Step(cfg, model, Process(0, 1, DEVICE), Schedule(cfg, 10, 1, DEVICE))
        dtype = torch.bfloat16 if step.precision == "bf16" else torch.float32
        sizes = [(2, cfg.global_crops_size), (cfg.local_crops_number, cfg.local_crops_size)]
        crops = [
            torch.empty(n * images, 3, side, side, device=DEVICE, dtype=dtype)
            for n, side in sizes
            if n
        ]
        for i in range(steps):
            # the last layer is frozen in the first one alone
            metrics = step(10 * i, itertools.repeat(crops))
            assert all(x.shape == () and x.device == DEVICE for x in metrics.values())
        for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
            assert x.device == DEVICE, name
    return step.how


def convert(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """`network.to(dtype)`, which fake parameters refuse."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(
                parameter.detach().to(dtype), parameter.requires_grad
            )


def prepare(backend: str | Callable | None) -> None:
    """Everything that Step may choose is there; what is compiled goes to `backend`."""
    warnings.simplefilter("ignore")
    if backend:
        usual = torch.nn.Module.compile
        torch.nn.Module.compile = lambda self, *args, **options: usual(
            self, *args, **{**options, "backend": backend}
        )
    torch.nn.init.trunc_normal_ = lambda tensor, *args, **options: tensor  # reads what it draws
    step_module.compiler_unavailable_reason = lambda device: None
    attention.xformers_unavailable_reason = attention.cudnn_unavailable_reason = lambda: None
    attention.fa3_unavailable_reason = lambda device: None
    attention.xformers_kernel_unavailable_reason = lambda *how: None
    step_module.activate = lambda impl: None


def main(mode: str, *faults: str) -> None:
    backend = "aot_eager" if mode == "compiled" else None
    prepare(backend)
    torch.library.define("planted::op", "(Tensor x) -> Tensor")
    torch.library.impl("planted::op", "CUDA", lambda x: x.clone())
    cases = COMPILED if backend else CASES
    found = {}
    for name, case, context in [(fault, CASES[0], planted(fault)) for fault in faults] or [
        (str(case), case, contextlib.nullcontext()) for case in cases
    ]:
        try:
            with context:
                found[name] = run(case, backend)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).strip()[:600]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
