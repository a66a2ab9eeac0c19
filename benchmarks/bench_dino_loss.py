"""dino_loss forward and backward: every implementation, and a copy of the student logits as the yardstick.

    python -m pytest benchmarks/bench_dino_loss.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
    python benchmarks/bench_dino_loss.py      the same in turns, as ratios of medians: for machines that are shared
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinofast import ops
from dinofast.testing import loss_inputs

SHAPES = ((10, 32, 65536), (10, 32, 4096))  # (V, B, K): the official head, a small one
DTYPES = (torch.float32, torch.bfloat16)


def step(inputs: tuple[Tensor, Tensor, Tensor], impl: str) -> Callable[[], None]:
    """Loss and gradient of the logits, freshly allocated each time, as in training."""
    student, teacher, center = inputs
    student.requires_grad_()

    def once() -> None:
        student.grad = None
        ops.dino_loss(student, teacher, center, 0.1, 0.04, impl)[0].backward()
    return once


def copy(inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """The student logits into memory already there: a read and a write by all threads."""
    source, target = inputs[0].detach(), torch.empty_like(inputs[0])
    return lambda: target.copy_(source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ("cpp", "reference", "copy"))
def test_dino_loss(benchmark: Callable, impl: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = loss_inputs("peaked", *shape, dtype=dtype)
    benchmark.group = f"dino_loss {shape} {dtype}"
    benchmark(copy(inputs) if impl == "copy" else step(inputs, impl))


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians in ms")
    for shape in SHAPES:
        for dtype in DTYPES:
            inputs = loss_inputs("peaked", *shape, dtype=dtype)
            rivals = {"cpp": step(inputs, "cpp"), "reference": step(inputs, "reference"), "copy": copy(inputs)}
            elapsed_ms: dict[str, list[float]] = {name: [] for name in rivals}
            for _ in range(7):
                for name, once in rivals.items():
                    once()  # pays for the state of memory that the one before it has left
                    start = time.perf_counter()
                    once()
                    elapsed_ms[name].append((time.perf_counter() - start) * 1e3)
            median = {name: statistics.median(times) for name, times in elapsed_ms.items()}
            print(f"{shape} {str(dtype):15}", *(f"{name} {ms:8.2f}" for name, ms in median.items()),
                  f"reference/cpp {median['reference'] / median['cpp']:.1f}", f"cpp/copy {median['cpp'] / median['copy']:.2f}")


if __name__ == "__main__":
    main()
