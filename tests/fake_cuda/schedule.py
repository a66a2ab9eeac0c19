"""What Inductor would run on an H100 for student and teacher: its own schedule of kernels, and the
bytes that they move.

    python schedule.py ['{"residual_precision": "bf16"}' [IMAGES]]    prints JSON: kernels and GiB

Nothing is compiled or run: the scheduler has fused what it can, and each kernel knows what it reads
and writes. Matrix products and attention are other libraries' and counted apart. The graphs:
teacher, student forward, student backward.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import device
import steps
import torch
import torch._inductor.config as config
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering

STEP = {
    "arch": "vit_small",
    "patch_size": 16,
    "global_crops_size": 224,
    "local_crops_size": 96,
    "local_crops_number": 8,
    "out_dim": 65536,
    "head_hidden_dim": 2048,
    "head_bottleneck_dim": 256,
    "drop_path_rate": 0.1,
    "attention": "varlen",
}
GIB = 2**30


class Scheduled(Exception):
    """There is a schedule, and no more is wanted."""


def let_inductor_believe() -> None:
    """In the device, and in a driver for Triton; patterns that try themselves out on it are left
    out."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from triton.backends.compiler import GPUTarget

    always: dict[str, Any] = {
        "get_device_properties": device.PROPERTIES,
        "current_device": 0,
        "is_available": True,
        "get_compute_capability": "90",
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "device_count": 1,
        "synchronize": None,
    }
    for owner in (CudaInterface, CudaInterface.Worker):
        for name, value in always.items():
            if hasattr(owner, name):
                setattr(owner, name, staticmethod(lambda *args, value=value, **options: value))
    for module, name in (
        (fuse_attention, "_sfdp_init"),
        (pad_mm, "_pad_mm_init"),
        (misc_patterns, "_misc_patterns_init"),
    ):
        if hasattr(module, name):
            setattr(module, name, lambda *args, **options: None)
    import torch._inductor.utils
    import torch.utils._triton

    for module in (torch._inductor.utils, torch.utils._triton):
        module.has_triton = lambda *args, **options: True

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, index):
            return 0

        def get_active_torch_device(self):
            return device.DEVICE

    triton.runtime.driver.set_active(Driver())
    config.joint_graph_constant_folding = config.fx_graph_cache = config.fx_graph_remote_cache = (
        False
    )
    config.compile_threads = 1
    torch._functorch.config.enable_autograd_cache = False


def operators(node: Any) -> str:
    """Those that a kernel is made of."""
    origins = [origin for inner in node.get_nodes() for origin in inner.node.get_origins()]
    names = {
        str(getattr(x.target, "__name__", x.target)).split(".")[0]
        for x in origins
        if x.op == "call_function"
    }
    return ", ".join(sorted(names))


def of_graph(scheduler: Any) -> dict[str, Any]:
    """Kernels of Inductor's and what they move; calls of libraries and what they move; the kernels
    that move most."""
    library = [type(node).__name__.startswith("Extern") for node in scheduler.nodes]
    moved, times = Counter(), Counter()
    for node, is_library in zip(scheduler.nodes, library, strict=True):
        if not is_library:
            moved[operators(node)] += node.get_read_write_buffers_sizes()
            times[operators(node)] += 1
    calls = sum(
        node.get_read_write_buffers_sizes()
        for node, is_library in zip(scheduler.nodes, library, strict=True)
        if is_library
    )
    return {
        "kernels": len(library) - sum(library),
        "gib": moved.total() / GIB,
        "library_calls": sum(library),
        "library_gib": calls / GIB,
        "most": [[name, times[name], n_bytes / GIB] for name, n_bytes in moved.most_common(12)],
    }


def backend(graphs: list[dict[str, Any]]) -> Callable:
    """One for `torch.compile` that schedules, notes the schedule, and runs the graph as it is."""
    compile_inner = compile_fx.compile_fx_inner

    def schedule(self: GraphLowering, *args: Any) -> None:
        self.codegen()
        graphs.append(of_graph(self.scheduler))
        raise Scheduled

    def inner(graph: torch.fx.GraphModule, inputs: list, **options: Any) -> Callable:
        kept = copy.deepcopy(graph)
        try:
            compile_inner(graph, inputs, **options)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Scheduled):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise

        def run(values: list) -> Any:
            mine = list(values)
            values.clear()
            return kept(*mine)

        run._boxed_call = True
        return run

    GraphLowering.compile_to_module = schedule
    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=inner)


def main(changes: str = "{}", images: str = "128") -> None:
    let_inductor_believe()
    graphs: list[dict[str, Any]] = []
    made = backend(graphs)
    steps.prepare(made)
    steps.run({**STEP, **json.loads(changes)}, made, int(images), steps=1)
    print(json.dumps(dict(zip(("teacher", "student", "backward"), graphs, strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
