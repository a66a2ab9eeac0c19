"""Options of the step that may make it faster, one at a time on top of the best so far, in turns
with it.

    python benchmarks/step_options.py --save-results

A candidate is kept if it takes at least 1 % more images a second than the best so far and its
losses are near; each row says what both took. One that this version or this device refuses is a row
with the reason. The last case is all that was kept against where it began.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import bench_step
import torch

from dinofast.bench import step as step_clock
from dinofast.bench.record import main
from dinofast.bench.step import StepRunner, Synthetic
from dinofast.bench.timing import row_of
from dinofast.config import Config
from dinofast.runtime.memory import retain_freed_memory

NAME = "options"
SECONDS = {"cpu": 10.0, "cuda": 4.0}  # of a case
# Relative, of a first step: two attentions, a teacher or a residual stream in bf16 are within
# 0.0001 and 0.003 of each other, noise as large as the gradient of attention is 0.017 off in the
# norm (ViT-Ti, bf16, CPU, 2026-11-27).
SAME_LOSS, SAME_NORM = 0.005, 0.01
GAIN = 1.01  # images a second, candidate / best so far, from which it is kept
ALL_KEPT = "all that was kept"
Options = dict[str, Any]


class Case(NamedTuple):
    """options: of `Config`, as (name, value) pairs; none of them: what was kept against the
    start."""

    step: bench_step.Case
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return (
            ", ".join(
                f"--{name} {str(value).lower() if isinstance(value, bool) else value}"
                for name, value in self.options
            )
            or ALL_KEPT
        )


# by expected gain and by how long they take to compile
OPTIONS = (
    ("residual_precision", "bf16"),
    ("cuda_graph", True),
    ("teacher_precision", "bf16"),
    ("attention", "xformers"),
    ("attention", "varlen"),
    ("attention", "fa3"),
    ("batch_size_per_gpu", 256),
    ("batch_size_per_gpu", 512),
    ("compile", "max-autotune"),
    ("attention", "cudnn"),
    ("batch_size_per_gpu", 1024),
)


def cases(device: torch.device) -> list[Case]:
    step = bench_step.Case("vit_small", 16, 128, bench_step.OURS)
    return [*(Case(step, (option,)) for option in OPTIONS), Case(step, ())]


def rehearsal() -> list[Case]:
    """One of an option that is not there, one of no value that can be, one that the step refuses;
    two that can be measured."""
    options = (
        ("attention", "eager"),
        ("planted_option", "bf16"),
        ("cuda_graph", "no truth value"),
        ("teacher_precision", "bf16"),
        ("batch_size_per_gpu", 4),
    )
    step = bench_step.rehearsal()[0]
    return [*(Case(step, (option,)) for option in options), Case(step, ())]


def candidates_of(case: Case) -> tuple[str, ...]:
    return ()


class Best(NamedTuple):
    """Kept from case to case, as it is compiled and warm. first: loss and gradient norm of its
    first step, to compare with those of a candidate, which has the same weights, crops and draws of
    stochastic depth."""

    options: Options
    runner: StepRunner
    first: tuple[float, float]


_done: list[dict[str, Any]] = []
_best: list[Best] = []  # one, or none


def go_on_from(cases: Sequence[dict[str, Any]]) -> None:
    _done[:] = cases


def best_options(cases: Sequence[dict[str, Any]]) -> Options:
    """Of all that was kept, the later on top of the earlier."""
    found: Options = {}
    for case in cases:
        if case.get("kept"):
            found |= case["options"]
    return found


def measure_case(case: Case, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    return list(growing(case, device, seconds))[-1]


def growing(
    case: Case, device: torch.device, seconds: float | None = None
) -> Iterator[dict[str, Any]]:
    """The case when it is begun, and when it is measured."""
    best = best_options(_done)
    options = dict(case.options) or best
    made: dict[str, Any] = {
        "case": str(case),
        "options": options,
        "on_top_of": best if case.options else {},
        "kept": False,
        "rows": [],
        "left_out": [],
    }
    yield made
    # each network that is compiled counts against one limit, as all share the code of their forward
    with retain_freed_memory(device), torch._dynamo.config.patch(recompile_limit=1000):
        before = best_so_far(case, device, made["on_top_of"])
        if reason := why_needless(case, options, before):
            yield made | {"left_out": [f"{case}: {reason}"]}
            return
        challenger = build(case, device, made["on_top_of"] | options)
        timed = step_clock.in_turns(
            [before.runner, challenger.runner], device, seconds or SECONDS[device.type]
        )
    rows = []
    for t, measured in zip(timed, (before, challenger), strict=True):
        row = row_of(
            t.name,
            t.step_ms,
            parts_ms=t.parts_ms,
            extra_mib=t.peak_gib and t.peak_gib * 1024,
            how=measured.runner.step.how,
        )
        row["images_per_s"] = measured.runner.step.cfg.batch_size_per_gpu / row["median_ms"] * 1e3
        rows.append(row)
    rows[1] |= compared(str(case), before, challenger)
    gain = rows[1]["images_per_s"] / rows[0]["images_per_s"]
    kept = bool(case.options) and rows[1]["same_losses"] and gain >= GAIN
    if kept:
        _best[:] = [challenger._replace(runner=replace(challenger.runner, name="best so far"))]
    yield made | {"rounds": len(timed[0].step_ms), "rows": rows, "gain": gain, "kept": kept}


def compared(name: str, before: Best, challenger: Best) -> dict[str, Any]:
    """Whether a candidate does the same step; with another batch the crops are others, and only the
    loss can be near."""
    alike = (
        before.runner.step.cfg.batch_size_per_gpu == challenger.runner.step.cfg.batch_size_per_gpu
    )
    tolerances = (SAME_LOSS, SAME_NORM) if alike else (bench_step.NEAR,)
    if all(
        abs(theirs - ours) <= tolerance * abs(ours)
        for theirs, ours, tolerance in zip(challenger.first, before.first, tolerances, strict=False)
    ):
        return {"same_losses": True}
    return {
        "same_losses": False,
        "losses": [list(challenger.first), list(before.first)],
        "differs": f"its first step has a loss and a gradient norm of {challenger.first}, the best "
        f"so far of {before.first}: not the same training step",
    }


def why_needless(case: Case, options: Options, before: Best) -> str:
    """Why there is nothing to compare; empty if there is."""
    if options == before.options:
        return "nothing was"
    same = {name for name, value in case.options if before.options.get(name) == value}
    runs = before.runner.step.how.split(",")[0].split()[:2]  # such as "attention varlen"
    if case.options and (
        len(same) == len(case.options) or runs == ["attention", options.get("attention")]
    ):
        return "the best so far has it"
    return ""


def best_so_far(case: Case, device: torch.device, options: Options) -> Best:
    """What the candidate must beat: warm from the case before, or built anew after a break."""
    if not _best or _best[0].options != options:
        _best.clear()
        gc.collect()
        found = build(case, device, options)
        _best.append(found._replace(runner=replace(found.runner, name="best so far")))
    return _best[0]


def build(case: Case, device: torch.device, options: Options) -> Best:
    """Warm. Raises ValueError for what this version or this device has not."""
    if unknown := sorted(set(options) - {f.name for f in fields(Config)}):
        raise ValueError(f"Config has no option '{unknown[0]}' in this version")
    cfg = case.step.config(
        device, **{"compile": "on" if device.type == "cuda" else "off"} | options
    )
    step, clock = step_clock.ours(cfg, device, step_clock.schedule_of(cfg, device))
    crops = Synthetic(cfg, device, torch.bfloat16 if step.precision == "bf16" else torch.float32)
    runner = StepRunner(str(case), step, crops, clock)
    metrics = step(0, crops)
    runner.done = 1
    first = metrics["loss"].item(), metrics["grad_norm"].item()
    step_clock.warm_up(runner, device)
    return Best(options, runner, first)


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
