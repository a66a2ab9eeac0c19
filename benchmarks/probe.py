"""What this device can do, by itself and in a step: the first minutes on a GPU, in order of worth.

    python benchmarks/probe.py --save-results

Ceilings: a large copy, bytes read and written counted, and a large product. The four products of a
block at the packed token count of a step, forward, gradient of the input, gradient of the weight.
Attention at each crop size and at DINO's mix, by every implementation that runs. One step eager and
one compiled under the profiler: its kernels, and the time in which none ran.

Axes: T packed tokens of a step, D width, H heads. Times are the device's, medians; TFLOP/s count a
multiplication and an addition as two, of attention the scores within a sequence alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import bench_step
import torch
from torch import Tensor

from dinofast.bench import step as step_clock
from dinofast.bench.record import main, rows_of, version
from dinofast.bench.step import Synthetic
from dinofast.bench.timing import MIB, Candidate, measure, reason_of, row_of
from dinofast.nn import attention
from dinofast.nn.packing import layout
from dinofast.runtime.distributed import Process
from dinofast.step import Step

NAME = "probe"
SECONDS = {"cpu": 1.0, "cuda": 0.3}  # a group of candidates
COPY_MIB, PRODUCT = 2048, 8192  # of the copy's source; rows and columns of the square product
PROFILED, SHOWN = 3, 60  # steps under the profiler, one after the other; kernels in the file
EAGER, COMPILED = "one step, eager", "one step, compiled"


class Case(NamedTuple):
    what: str
    step: bench_step.Case = bench_step.Case("vit_small", 16, 128, bench_step.OURS)
    width: int = 384
    heads: int = 6
    large: bool = True

    def __str__(self) -> str:
        return (
            self.what
            if self.what in ("device", "ceilings")
            else f"{self.what}, {self.step.images} images"
        )

    def runs(self) -> dict[int, tuple[int, int]]:
        """(sequences, tokens of each) by the side of the crop."""
        crops = ((self.step.size, 2), (self.step.local_size, 8))
        return {
            side: (n * self.step.images, (side // self.step.patch_size) ** 2 + 1)
            for side, n in crops
        }


WORK: dict[str, Callable[[Case, torch.device, float], dict[str, Any]]] = {}


def cases(device: torch.device) -> list[Case]:
    return [Case(what) for what in WORK]


def rehearsal() -> list[Case]:
    return [Case(what, bench_step.rehearsal()[0], 48, 3, large=False) for what in WORK]


def candidates_of(case: Case) -> tuple[str, ...]:
    return ()


def measure_case(case: Case, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    return {"case": str(case)} | WORK[case.what](case, device, seconds or SECONDS[device.type])


def part(what: str) -> Callable:
    def named(work: Callable[[Case, torch.device, float], dict[str, Any]]) -> Callable:
        WORK[what] = work
        return work

    return named


@part("device")
def facts(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: version(name)
        for name in (
            "numpy",
            "triton",
            "xformers",
            "flash-attn",
            "flash-attn-3",
            "nvidia-dali-cuda130",
        )
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            name: getattr(properties, name, None)
            for name in (
                "name",
                "major",
                "minor",
                "total_memory",
                "multi_processor_count",
                "L2_cache_size",
                "clock_rate",
                "memory_clock_rate",
                "shared_memory_per_block_optin",
            )
        }
        found |= {
            "free_memory": torch.cuda.mem_get_info(device)[0],
            "cudnn": torch.backends.cudnn.version(),
        }
    found["varlen"] = bool(importlib.util.find_spec("torch.nn.attention.varlen"))
    return {"rows": [], "facts": found, "left_out": []}


@part("ceilings")
def ceilings(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    n, size = (PRODUCT, COPY_MIB) if case.large else (256, 1)
    source = torch.randn(size * MIB // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    name = f"product, {n:,} squared, bf16"

    def copy() -> None:
        target.copy_(source)

    candidates = [
        Candidate(f"copy of {size:,} MiB", copy, 2 * source.nbytes),
        Candidate(name, lambda: (a @ b,), flops=2.0 * n**3),
    ]
    return {"rows": rows_of(measure(candidates, device, seconds)), "left_out": []}


@part("products")
def products(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """y = x w^T of x (T, in) and w (out, in); the gradients g w of x and g^T x of w, g (T, out)."""
    tokens, d = sum(n * each for n, each in case.runs().values()), case.width
    candidates = []
    for name, wide, out in (
        ("qkv", d, 3 * d),
        ("proj", d, d),
        ("fc1", d, 4 * d),
        ("fc2", 4 * d, d),
    ):
        x, w, g = (
            torch.randn(shape, device=device).bfloat16()
            for shape in ((tokens, wide), (out, wide), (tokens, out))
        )
        count = 2.0 * tokens * wide * out
        candidates += [
            Candidate(f"{name}, forward", lambda x=x, w=w: (x @ w.T,), flops=count),
            Candidate(f"{name}, of the input", lambda g=g, w=w: (g @ w,), flops=count),
            Candidate(f"{name}, of the weight", lambda g=g, x=x: (g.T @ x,), flops=count),
        ]
    return {
        "tokens": tokens,
        "rows": rows_of(measure(candidates, device, seconds * len(candidates))),
        "left_out": [],
    }


def attentions(
    runs: tuple[tuple[int, int], ...], case: Case, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Forward, and backward given the forward's output, of q, k, v (T, H, D / H) in bf16."""
    where = layout(runs, device)
    tokens, width = sum(n * each for n, each in runs), case.width // case.heads
    q, k, v, grad = (
        torch.randn(tokens, case.heads, width, device=device).bfloat16().requires_grad_(i < 3)
        for i in range(4)
    )
    count = 4.0 * case.width * sum(n * each**2 for n, each in runs)
    candidates, refused = [], []

    def forward_of(impl: str) -> Tensor:
        attention.activate(impl)  # of torch's flash attentions there is one at a time
        return attention.attention(q, k, v, where, impl)

    def backward_of(impl: str, out: Tensor) -> tuple[Tensor, ...]:
        attention.activate(impl)
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    for impl in attention.ATTENTIONS:
        try:
            attention.select_attention(impl, device, torch.bfloat16, width)
            out = forward_of(impl)
        except Exception as error:
            refused.append({"candidate": impl, "failed": reason_of(error)})
            continue
        candidates += [
            Candidate(
                f"{impl}, forward", lambda impl=impl: (forward_of(impl).detach(),), flops=count
            ),
            Candidate(
                f"{impl}, backward",
                lambda impl=impl, out=out: backward_of(impl, out),
                flops=2.5 * count,
            ),
        ]
    return {
        "tokens": tokens,
        "rows": rows_of(measure(candidates, device, seconds * len(candidates))) + refused,
        "left_out": [],
    }


@part("attention of large crops")
def attention_of_large(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    return attentions((case.runs()[case.step.size],), case, device, seconds)


@part("attention of small crops")
def attention_of_small(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    return attentions((case.runs()[case.step.local_size],), case, device, seconds)


@part("attention of the mix")
def attention_of_mix(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    return attentions(tuple(case.runs().values()), case, device, seconds)


@part(EAGER)
def eager_step(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    return profile(case, device, "off")


@part(COMPILED)
def compiled_step(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    return profile(case, device, "on")


def profile(case: Case, device: torch.device, compiled: str) -> dict[str, Any]:
    """PROFILED steps one after the other; what is in the table is of one."""
    cfg = case.step.config(device, compile=compiled)
    step = Step(
        cfg, step_clock.new_model(cfg), Process(0, 1, device), step_clock.schedule_of(cfg, device)
    )
    batches = Synthetic(cfg, device, torch.bfloat16 if step.precision == "bf16" else torch.float32)
    candidate = step_clock.StepRunner("dinofast", step, batches, None)
    step_clock.warm_up(candidate, device)
    (timed,) = step_clock.in_turns([candidate], device, 0.0)
    activity = (
        torch.profiler.ProfilerActivity.CUDA
        if device.type == "cuda"
        else torch.profiler.ProfilerActivity.CPU
    )
    with torch.profiler.profile(activities=[activity]) as profiler:
        candidate.turn(device, PROFILED)
    whole = row_of("without the profiler", timed.step_ms)
    whole["images_per_s"] = case.step.images / whole["median_ms"] * 1e3
    what = {} if device.type == "cuda" else {"stand_in": "operators of a CPU, not kernels of a GPU"}
    table = kernel_table(spans(profiler.events(), device), PROFILED)
    return {"how": step.how, "rows": [whole], **table, **what, "left_out": []}


def spans(events: Iterable[Any], device: torch.device) -> list[tuple[str, float, float]]:
    """(name, start, end) in us of all that the device did; on a CPU of the operators that no other
    calls."""
    if device.type == "cpu":
        kept = [e for e in events if e.cpu_parent is None]
    else:  # annotations lie over the kernels they stand for
        cuda = torch.autograd.DeviceType.CUDA
        kept = [
            e
            for e in events
            if e.device_type == cuda and not getattr(e, "is_user_annotation", False)
        ]
    return [(e.name, e.time_range.start, e.time_range.end) for e in kept]


def kernel_table(found: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Of one step: the kernels that took most, by name; all of them together; the time between
    first and last in which none ran. us."""
    by_name: dict[str, list[float]] = defaultdict(list)
    busy, gaps, n_gaps, until = 0.0, 0.0, 0, None
    for name, start, end in sorted(found, key=lambda span: span[1]):
        by_name[name].append(end - start)
        if until is not None and start > until:
            gaps, n_gaps = gaps + start - until, n_gaps + 1
        busy += end - start
        until = end if until is None else max(until, end)
    rows = sorted(
        (
            {
                "kernel": name[:200],
                "calls": len(times) / steps,
                "total_us": sum(times) / steps,
                "share": sum(times) / busy if busy else 0.0,
            }
            for name, times in by_name.items()
        ),
        key=lambda row: -row["total_us"],
    )
    return {
        "kernels": rows[:SHOWN],
        "kernels_us": busy / steps,
        "n_kernels": len(found) / steps,
        "gaps_us": gaps / steps,
        "n_gaps": n_gaps / steps,
        "n_names": len(by_name),
    }


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
