"""Compiles, without a GPU, what a launcher of Triton kernels would launch, and reads the machine
code.

    python tests/ops/ahead_of_time.py dino_loss    prints JSON, an entry a kernel and configuration

A process of its own, because TRITON_INTERPRET must not be set when the kernels are decorated. The
launcher itself is run, on tensors without memory ("meta"), so that shapes, constants and
divisibilities are those of a real call.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ARCHITECTURES = (80, 90)
Launch = tuple[JITFunction, tuple, dict]


def launches_of(call: Callable[[], object], *modules: ModuleType) -> list[Launch]:
    """The kernels of the modules that `call` launches, with their arguments; none is run."""
    recorded = []

    class Recorder:
        def __init__(self, kernel: JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: recorded.append((self.kernel, args, options))

    kernels = [
        (vars(m), name, x)
        for m in modules
        for name, x in vars(m).items()
        if isinstance(x, JITFunction)
    ]
    for names, name, kernel in kernels:
        names[name] = Recorder(kernel)
    try:
        call()
    finally:
        for names, name, kernel in kernels:
            names[name] = kernel
    return recorded


def _source(
    kernel: JITFunction, args: tuple, options: dict, architecture: int
) -> tuple[ASTSource, Any]:
    """What is compiled of a launch, and with which options."""
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    bound, specialization, options = create_function_from_signature(
        kernel.signature, kernel.params, backend
    )(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), parsed


def health(source: ASTSource, options: Any, architecture: int) -> dict:
    """What machine_code.py reads, and how many products are fused with a sum, and quotients not
    rounded to nearest."""
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=options.__dict__
    )
    ptx, warps = compiled.asm["ptx"], compiled.metadata.num_warps
    return {
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "approximate": len(re.findall(r"\b(div|rcp)\.(full|approx)", ptx)),
        "warps": warps,
        "triton": triton.__version__,
        **machine_code.read(compiled.asm["cubin"], compiled.metadata.shared, warps, architecture),
    }


def dino_loss() -> Iterator[tuple[dict[str, object], Launch]]:
    from dinofast.kernels import dino_loss as forward
    from dinofast.kernels import dino_loss_backward as backward

    def call(
        student: torch.Tensor,
        teacher: torch.Tensor,
        center: torch.Tensor | None,
        number: torch.Tensor,
    ) -> None:
        plain = center is None
        *_, saved = forward.dino_loss(student, teacher, center, 0.1, number, 18, plain, True)
        backward.dino_loss_backward(number, student, teacher, saved, 0.1, not plain, 18, plain)
        if not plain:
            forward.dino_loss(student, teacher, center, 0.1, number, 18, False, False)

    cases = [
        *itertools.product(
            (torch.float32, torch.bfloat16, torch.float16), (65536,), (True, False), (2,)
        ),
        # strides of 1; unaligned rows; many chunks a row
        *((torch.bfloat16, k, True, 2) for k in (1, 65537, 2**20)),
        *((torch.bfloat16, k, False, 1) for k in (65536, 1)),
    ]
    for dtype, prototypes, centered, teachers in cases:
        student, teacher = (
            torch.empty(n, 64, prototypes, dtype=dtype, device="meta") for n in (10, teachers)
        )
        center = torch.empty(prototypes, device="meta") if centered else None
        number = torch.empty((), device="meta")
        for launch in launches_of(
            partial(call, student, teacher, center, number), forward, backward
        ):
            # these see no logits
            if launch[0].__name__ not in ("_join", "_finish") or dtype == torch.bfloat16:
                yield (
                    {
                        "dtype": str(dtype),
                        "prototypes": prototypes,
                        "centered": centered,
                        "teachers": teachers,
                        "whole": prototypes % forward.CHUNK == 0,
                    },
                    launch,
                )


def adamw_ema() -> Iterator[tuple[dict[str, object], Launch]]:
    from dinofast.kernels import adamw_ema as module
    from dinofast.kernels import multi_tensor

    def tensors(dtype: torch.dtype | None = torch.float32) -> list[torch.Tensor | None]:
        return [
            None if dtype is None else torch.empty(size, dtype=dtype, device="meta")
            for size in (4096, 7)
        ]

    def call(grad: torch.dtype, copy: torch.dtype | None) -> None:
        number = torch.empty((), device="meta")
        skip = torch.empty((), dtype=torch.bool, device="meta")
        module.grad_norms(tensors(grad))
        module.adamw_ema_(
            tensors(),
            tensors(grad),
            tensors(),
            tensors(),
            [number] * 2,
            tensors(),
            tensors(copy),
            tensors(copy),
            torch.empty(2, device="meta"),
            skip,
            number,
            number,
            0.9,
            0.999,
            1e-8,
            number,
        )
        module.ema_(tensors(), tensors(grad), tensors(copy), number, skip)

    cases = (
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    )
    for aligned, (grad, copy) in itertools.product((True, False), cases):
        multi_tensor._are_aligned = lambda addresses, aligned=aligned: aligned
        # tensors without memory all have the same address
        multi_tensor._tables_on_stream.cache_clear()
        for launch in launches_of(partial(call, grad, copy), module):
            # these two do not vary
            if launch[0].__name__ not in ("_prepare", "_norms") or (aligned and copy is None):
                yield {"grad": str(grad), "copy": str(copy), "aligned": aligned}, launch


def color() -> Iterator[tuple[dict[str, object], Launch]]:
    from dinofast.kernels import color as module

    crops = [torch.empty(64, 224, 224, 3, dtype=torch.uint8, device="meta")] * 2
    numbers = torch.empty(128, module.FIELDS, dtype=torch.int32, device="meta")
    table = torch.empty(3, 256, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        call = partial(module.color, crops, numbers, 70, table, dtype)
        for launch in {
            (kernel, str(options)): (kernel, args, options)
            for kernel, args, options in launches_of(call, module)
        }.values():
            yield {"dtype": str(dtype)}, launch


def normalize() -> Iterator[tuple[dict[str, object], Launch]]:
    from dinofast.kernels import normalize as module

    for dtype, side, interleaved in itertools.product(
        (torch.float32, torch.bfloat16), (224, 33), (False, True)
    ):
        layout = torch.channels_last if interleaved else torch.contiguous_format
        crops = torch.empty(
            64, 3, side, side, dtype=torch.uint8, device="meta", memory_format=layout
        )
        table = torch.empty(3, 256, dtype=dtype, device="meta")
        for launch in launches_of(partial(module.normalize, crops, table), module):
            yield {"dtype": str(dtype), "interleaved": interleaved, "whole": side % 4 == 0}, launch


_cases: list[tuple[ASTSource, Any, int]] = []  # sources do not pickle: there before processes fork


def _health(i: int) -> dict:
    return health(*_cases[i])


def compiled(operation: str) -> list[dict[str, object]]:
    """One entry for every launch and architecture, compiled on all cores; what is the same for
    several launches once."""
    launches = globals()[operation]()  # of `Operation.file`
    entries, distinct = [], {}
    for (labels, (kernel, *call)), architecture in itertools.product(launches, ARCHITECTURES):
        source, options = _source(kernel, *call, architecture)
        key = source.hash(), repr(options), architecture
        distinct[key] = source, options, architecture
        entries.append(({"kernel": kernel.__name__, **labels, "architecture": architecture}, key))
    _cases[:] = distinct.values()
    with multiprocessing.get_context("fork").Pool() as pool:
        found = dict(zip(distinct, pool.map(_health, range(len(_cases)), chunksize=1), strict=True))
    return [labels | found[key] for labels, key in entries]


if __name__ == "__main__":
    print(json.dumps(compiled(sys.argv[1])))
