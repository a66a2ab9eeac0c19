"""The optimizer's step, clip + AdamW + teacher's average, on ViT-S/16 with its head (44 M
parameters), and the plain average.

    python -m pytest benchmarks/bench_adamw_ema.py    prints it; --save-results keeps it
    python benchmarks/bench_adamw_ema.py --save-results   the same without pytest

"official" does what the official loop does: norm of each tensor read on the host, clip in place,
`torch.optim.AdamW`, average tensor by tensor; "official, fused AdamW" the same with torch's fused
AdamW; "official checkout" takes `clip_gradients` itself from where $DINO_OFFICIAL points. Gradients
are below the limit, so that the official clip only reads them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import official_checkout
import torch
from torch import nn

from dinofast import AdamWEMA, DINOHead, MultiCropWrapper, ops, param_groups, vit_small
from dinofast.bench import baseline as official
from dinofast.bench.record import flag, main, rows_of
from dinofast.bench.timing import MIB, Candidate, copies, measure

NAME = "adamw_ema"
CLIP, MOMENTUM, LR, WEIGHT_DECAY = 3.0, 0.996, 5e-4, 0.04
# Bytes a number: the gradient read for its norm, then 5 read and 4 written; the average alone.
STEP_BYTES, AVERAGE_BYTES = 40, 12
SECONDS = {"cpu": 8.0, "cuda": 3.0}  # a case


class Case(NamedTuple):
    what: str  # "step" or "average"
    numbers: int | None = None  # kept of each axis of each tensor; None: all

    def __str__(self) -> str:
        what = {"step": "clip, AdamW and average", "average": "average alone"}[self.what]
        return f"{what}, ViT-S/16 with its head" + (
            f", cut to {self.numbers} an axis" if self.numbers else ""
        )


def cases(device: torch.device) -> list[Case]:
    """The first is the one that docs/benchmarks.md shows in full; the last shows the price of the
    calls."""
    return [Case("step"), Case("average"), Case("step", 2)]


def candidates_of(case: Case) -> tuple[str, ...]:
    # that of the official code is a part of a longer function, which cannot be taken out
    if case.what == "average":
        return "official", "dinofast"
    return (
        "official",
        "official checkout",
        "official, fused AdamW",
        "torch, foreach and fused",
        "dinofast",
    )


def measure_case(case: Case, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    """The candidates, checked against each other and then measured in turns."""
    model = make_model(case).to(device)
    candidates, left_out, differs = steps(model) if case.what == "step" else averages(model)
    if case.numbers:  # so few bytes say nothing of bandwidth
        candidates = [replace(candidate, moved_bytes=None) for candidate in candidates]
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    timings = measure(
        [*candidates, *copies(parameters, "the parameters")],
        device,
        seconds or SECONDS[device.type],
    )
    flag(rows := rows_of(timings), differs)
    op = {"step": "adamw_ema_", "average": "ema_"}[case.what]
    return {
        "case": str(case),
        "tensors": len(list(model.parameters())),
        "numbers": parameters.numel(),
        "dtype": "float32",
        "implementation": ops.paths()[op][device.type],
        "rounds": max(len(t.elapsed_ms) for t in timings),
        "parameters_mib": parameters.nbytes / MIB,
        "rows": rows,
        "left_out": left_out,
    }


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = MultiCropWrapper(vit_small(), DINOHead(384, 65536 if case.numbers is None else 64))
    if case.numbers:  # as many tensors, next to no numbers
        for p in model.parameters():
            p.data = p.data[(slice(case.numbers),) * p.ndim].clone()
    return model


def steps(model: nn.Module) -> tuple[list[Candidate], list[str], dict[str, str]]:
    """Each has a student, teacher and moments of its own; why others are left out; what differs
    after three steps."""
    made = {"official": _official_step(model, official.clip_gradients)}
    left_out = []
    if official_checkout.is_there():
        made["official checkout"] = _official_step(
            model, official_checkout.take("utils.py", "clip_gradients")
        )
    else:
        left_out.append(f"official checkout: {official_checkout.NOT_SET}")
    made["official, fused AdamW"] = _official_step(model, official.clip_gradients, fused=True)
    made["torch, foreach and fused"] = _foreach_step(model)
    made["dinofast"] = _step(model)
    differs = {}
    for name, (call, student, teacher) in made.items():
        try:
            for _ in range(3):
                call()
        except Exception:  # it will raise again when it is timed, and be flagged
            continue
        if difference := differing((student, teacher), made["official"][1:]):
            differs[name] = difference
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return (
        [
            Candidate(
                name,
                call,
                STEP_BYTES * trained + AVERAGE_BYTES * frozen if name == "dinofast" else None,
            )
            for name, (call, _, _) in made.items()
        ],
        left_out,
        differs,
    )


def averages(model: nn.Module) -> tuple[list[Candidate], list[str], dict[str, str]]:
    pairs = [(_shifted(model), copy.deepcopy(model)) for _ in range(2)]
    lists = [list(m.parameters()) for m in reversed(pairs[1])]
    calls = (lambda: official.average(*pairs[0], MOMENTUM), lambda: ops.ema_(*lists, MOMENTUM))
    for call in calls:
        call()
    difference = differing(pairs[1], pairs[0])
    ours = Candidate("dinofast", calls[1], AVERAGE_BYTES * sum(p.numel() for p in lists[0]))
    return (
        [Candidate("official", calls[0]), ours],
        [],
        {"dinofast": difference} if difference else {},
    )


def differing(ours: tuple[nn.Module, nn.Module], theirs: tuple[nn.Module, nn.Module]) -> str:
    """The first parameter of student or teacher that is not the official one, and by how much;
    empty if all are."""
    for one, other in zip(ours, theirs, strict=True):
        for (where, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            if not torch.allclose(p, q, rtol=1e-5, atol=1e-6):
                return (
                    f"{where} is off by up to {(p - q).abs().max().item():.2g} from the "
                    "official one"
                )
    return ""


def _step(model: nn.Module) -> tuple[Callable[[], None], nn.Module, nn.Module]:
    student, teacher = _with_gradients(model), copy.deepcopy(model)
    optimizer = AdamWEMA(
        param_groups(student),
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        student=student,
        teacher=teacher,
        clip_grad=CLIP,
    )

    def call() -> None:
        optimizer.step(momentum=MOMENTUM)

    return call, student, teacher


def _official_step(
    model: nn.Module, clip: Callable[[nn.Module, float], object], fused: bool | None = None
) -> tuple[Callable[[], None], nn.Module, nn.Module]:
    student, teacher = _with_gradients(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        param_groups(student), lr=LR, weight_decay=WEIGHT_DECAY, fused=fused
    )

    def call() -> None:
        clip(student, CLIP)
        optimizer.step()
        official.average(student, teacher, MOMENTUM)

    return call, student, teacher


def _foreach_step(model: nn.Module) -> tuple[Callable[[], None], nn.Module, nn.Module]:
    """The best that torch's own many-tensor functions give for the same result; no value is read on
    the host."""
    student, teacher = _with_gradients(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        param_groups(student), lr=LR, weight_decay=WEIGHT_DECAY, fused=True
    )
    students, teachers = ([p.detach() for p in m.parameters()] for m in (student, teacher))
    grads = [p.grad for p in student.parameters() if p.grad is not None]

    def call() -> None:
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, list((CLIP / (norms + 1e-6)).clamp(max=1.0).unbind()))
        optimizer.step()
        torch._foreach_lerp_(teachers, students, 1 - MOMENTUM)

    return call, student, teacher


def _with_gradients(model: nn.Module) -> nn.Module:
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for p in student.parameters():
        if p.requires_grad:
            p.grad = (torch.randn(p.shape, generator=generator) * 1e-4).to(p.device)
    return student


def _shifted(model: nn.Module) -> nn.Module:
    """Far enough from the teacher that an average can be told from none."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    return student


def rehearsal() -> list[Case]:
    return [Case("step", 2), Case("average", 2)]


def test_adamw_ema(measure: Callable[[], dict[str, Any]]) -> None:
    assert measure()["rows"]


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
