"""A whole optimiser step, clip + AdamW + teacher's average, on ViT-S/16 with its head (44 M parameters), and the plain average.

    python -m pytest benchmarks/bench_adamw_ema.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
    python benchmarks/bench_adamw_ema.py      the same in turns, medians and quartiles: for machines that are shared

"official" does what the official loop does: norm of each tensor read on the host, clip in place, `torch.optim.AdamW`, average
tensor by tensor; "official, fused" the same with torch's fused AdamW. Gradients are below the limit, so that the official clip
only reads them. "copy" moves the parameters into memory already there.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dinofast import AdamWEMA, DINOHead, MultiCropWrapper, ops, param_groups, vit_small

CLIP, MOMENTUM = 3.0, 0.996
STEP_BYTES, AVERAGE_BYTES, COPY_BYTES = 40, 12, 8  # an element: what our two passes move; the average alone; a copy


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return MultiCropWrapper(vit_small(), DINOHead(384, 65536))


def tiny(model: nn.Module) -> nn.Module:
    """As many tensors, next to no numbers: what is left is the price of the call."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = p.data[(slice(2),) * p.ndim].clone()
    return model


def with_gradients(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy of the model whose gradients are set, and its teacher."""
    student, teacher = copy.deepcopy(model), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for p in student.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-4
    return student, teacher


def step(model: nn.Module) -> Callable[[], None]:
    student, teacher = with_gradients(model)
    optimizer = AdamWEMA(param_groups(student), lr=5e-4, weight_decay=0.04, student=student, teacher=teacher, clip_grad=CLIP)
    return _keeping(lambda: optimizer.step(momentum=MOMENTUM), student, teacher)


def official(model: nn.Module, fused: bool = False) -> Callable[[], None]:
    student, teacher = with_gradients(model)
    optimizer = torch.optim.AdamW(param_groups(student), lr=5e-4, weight_decay=0.04, fused=fused)

    def once() -> None:
        norms = []
        for p in student.parameters():
            if p.grad is not None:
                norm = p.grad.norm(2)
                norms.append(norm.item())
                factor = CLIP / (norm + 1e-6)
                if factor < 1:
                    p.grad.mul_(factor)
        optimizer.step()
        with torch.no_grad():
            for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
                t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s.detach())
    return _keeping(once, student, teacher)


def average(model: nn.Module, impl: str | None = None) -> Callable[[], None]:
    students, teachers = list(model.parameters()), list(copy.deepcopy(model).parameters())
    return lambda: ops.ema_(teachers, students, MOMENTUM, impl=impl)


def copy_of(model: nn.Module) -> Callable[[], None]:
    source = torch.cat([p.detach().flatten() for p in model.parameters()])
    target = source.clone()
    return lambda: target.copy_(source)


def _keeping(once: Callable[[], None], student: nn.Module, teacher: nn.Module) -> Callable[[], None]:
    once.weights = lambda: [p.detach() for p in (*student.parameters(), *teacher.parameters())]  # to compare the results
    return once


def check_same(ours: Callable[[], None], theirs: Callable[[], None]) -> None:
    for a, b in zip(ours.weights(), theirs.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


RIVALS = {"step": step, "official": official, "official, fused": lambda model: official(model, fused=True), "average": average,
          "average, reference": lambda model: average(model, "reference"), "copy": copy_of}
BYTES = {"step": STEP_BYTES, "average": AVERAGE_BYTES, "copy": COPY_BYTES}


@pytest.mark.parametrize("name", RIVALS)
def test_adamw_ema(benchmark: Callable, name: str) -> None:
    benchmark.group = "adamw_ema_, ViT-S/16 with its head"
    benchmark(RIVALS[name](small_vit()))


def turns(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Elapsed milliseconds of every rival, one round after the other."""
    rivals = {name: make(model) for name, make in RIVALS.items()}
    elapsed_ms: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, once in rivals.items():
            once()  # pays for the state of memory that the one before it has left
            start = time.perf_counter()
            once()
            elapsed_ms[name].append((time.perf_counter() - start) * 1e3)
    check_same(rivals["step"], rivals["official"])
    return elapsed_ms


def main() -> None:
    model = small_vit()
    tensors, numbers = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads; "
          f"{tensors} tensors, {numbers / 1e6:.1f} M numbers")
    for what, subject, rounds in (("full size", model, 9), ("a few numbers a tensor", tiny(model), 51)):
        elapsed_ms = turns(subject, rounds)
        median = {name: statistics.median(times) for name, times in elapsed_ms.items()}
        print(f"{what}, {rounds} rounds, medians [quartiles] in ms:")
        for name, times in elapsed_ms.items():
            low, _, high = statistics.quantiles(times, n=4)
            speed = f", {BYTES[name] * numbers / median[name] / 1e6:.1f} GB/s" if name in BYTES and subject is model else ""
            print(f"  {name:20} {median[name]:8.3f} [{low:.3f}, {high:.3f}]{speed}")
        print(f"  official / step {median['official'] / median['step']:.2f}, official, fused / step "
              f"{median['official, fused'] / median['step']:.2f}")


if __name__ == "__main__":
    main()
