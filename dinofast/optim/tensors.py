"""Parameters of every kind: which can be averaged, complex ones as pairs of real numbers, sharded
ones by the part on this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops

TRAINABLE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
_PLAIN = (Tensor, nn.Parameter)


def is_sharded(x: Tensor) -> bool:
    """A DTensor: of FSDP2 (`fully_shard`) or tensor parallelism."""
    return type(x) not in _PLAIN and hasattr(x, "to_local")


def is_flat(p: Tensor) -> bool:
    """A part of a flat parameter of FSDP1, or all of it."""
    return getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False)


def local(x: Any) -> Any:
    """Of a DTensor the part on this process, in the same memory; anything else itself."""
    if isinstance(x, Tensor) and is_sharded(x):
        return x.to_local()  # type: ignore[attr-defined]
    return x


def real(x: Any) -> Any:
    """`local`, and a complex tensor (...) as a real one (..., 2) in the same memory."""
    x = local(x)
    return torch.view_as_real(x.resolve_conj()) if x is not None and x.is_complex() else x


def as_real(params: Sequence[Tensor], *lists: Any) -> Any:
    """lists: of what goes with `params`, each tensor or None; as they are if nothing is complex or
    sharded, else through `real`."""
    if not any(p.is_complex() or is_sharded(p) for p in params):
        return lists
    return tuple([real(x) for x in xs] for xs in lists)


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm (n,) of each of n gradients; of a sharded one over all its shards: one all-reduce
    for each dimension of the mesh."""
    (views,) = as_real(grads, grads)
    norms = ops.grad_norms(views)
    rows: dict[Any, list[int]] = {}
    for i, grad in enumerate(grads):
        if is_sharded(grad):
            for dim, placement in enumerate(grad.placements):  # type: ignore[attr-defined]
                if placement.is_partial():
                    raise ValueError(
                        "a gradient is a DTensor of partial sums: redistribute it first."
                    )
                if placement.is_shard():
                    group = grad.device_mesh.get_group(dim)  # type: ignore[attr-defined]
                    rows.setdefault(group, []).append(i)
    for group, of_group in rows.items():
        squares = norms[of_group].double() ** 2
        dist.all_reduce(squares, group=group)
        norms[of_group] = squares.sqrt().float()
    return norms


def pairs(student: nn.Module, teacher: nn.Module) -> dict[Tensor, Tensor]:
    """Student's parameter -> teacher's; without those that have no average (integers, 8-bit floats,
    sparse ones), which stay as they are. Raises ValueError for modules that do not go together."""
    students, teachers = list(student.named_parameters()), list(teacher.parameters())
    if len(students) != len(teachers):
        raise ValueError(
            f"student and teacher differ: {len(students)} parameters here and {len(teachers)} "
            "there."
        )
    found: dict[Tensor, Tensor] = {}
    for (name, s), t in zip(students, teachers, strict=True):
        if s.shape != t.shape:
            raise ValueError(
                f"student and teacher differ: a parameter is {tuple(s.shape)} here and "
                f"{tuple(t.shape)} there."
            )
        if s is t:
            raise ValueError(
                "student and teacher share a parameter: the teacher must be a copy "
                "(copy.deepcopy(student))."
            )
        if getattr(s, "placements", None) != getattr(t, "placements", None):
            raise ValueError(
                f"student and teacher differ: '{name}' is not sharded alike; shard both in the "
                "same way (fully_shard)."
            )
        if has_average(s) and has_average(t) and s.is_complex() == t.is_complex():
            found[s] = t
        elif s.dtype != t.dtype or not _equal(s, t):
            raise ValueError(
                f"student and teacher differ in '{name}' ({s.dtype} here, {t.dtype} there), and "
                "such numbers have no average: copy the student's into the teacher."
            )
    return found


def has_average(p: Tensor) -> bool:
    return p.dtype in TRAINABLE and p.layout is torch.strided


def _equal(s: Tensor, t: Tensor) -> bool:
    if "meta" in (s.device.type, t.device.type):
        return True
    if s.layout is not torch.strided:
        s, t = s.to_dense(), t.to_dense()
    if not s.is_quantized:  # by their bits: torch compares no 8-bit floats
        s, t = (x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (s, t))
    return torch.equal(s, t.to(s.device))


def inside_zero() -> bool:
    """Whether torch's ZeroRedundancyOptimizer, which gives each process some of the parameters, is
    making this optimizer."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            return True
        frame = frame.f_back
    return False
