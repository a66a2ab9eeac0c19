"""dino_loss in Triton: the machine code without a GPU, and the kernel itself on one. Interpreted:
test_dino_loss.py."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import budgets
import pytest
import torch
from accuracy import assert_no_worse
from torch import Tensor

from dinofast import ops
from dinofast.bench.inputs import LOSS_KINDS, loss_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("architecture", (80, 90))
def test_compiled_for_every_configuration(
    compiled_ahead_of_time: Callable, architecture: int
) -> None:
    kernels = [k for k in compiled_ahead_of_time("dino_loss") if k["architecture"] == architecture]
    assert {k["kernel"] for k in kernels} == {
        "_sum_columns",
        "_statistics",
        "_join",
        "_finish",
        "_gradient",
    }
    # bf16 with a center, also without a gradient; without one; two more dtypes, whose _join and
    # _finish are the same
    assert len(kernels) == 4 * (5 + 4) + 3 * 4 + 2 * (3 + 2 + 2)
    for k in kernels:
        assert k["stack"] == 0 and k["spills"] == 0, k
        # else the rows are not aligned
        if k["kernel"] in ("_sum_columns", "_statistics", "_gradient") and k["whole"]:
            assert (
                k["loads_16"] >= 1 + k["teachers"] + k["centered"] or k["kernel"] == "_sum_columns"
            ), k
            assert k["loop"]["loads_16"] > 0, k
            assert k["stores_16"] > 0 or k["kernel"] != "_gradient", k
    assert not budgets.over(kernels)


def test_on_the_cpu_only_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' has no dino_loss for cpu tensors"):
        ops.dino_loss(*loss_inputs("flat", 2, 1, 3), 0.1, 0.04, "triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops._choice, "NO_TRITON", "Triton is not installed")
    assert ops.paths()["dino_loss"]["cuda"] == "reference (plain torch): Triton is not installed"
    with pytest.raises(
        RuntimeError, match="impl='triton' was asked for, but Triton is not installed"
    ):
        ops.dino_loss(*loss_inputs("flat", 2, 1, 3), 0.1, 0.04, "triton")
    code = (
        "import sys; sys.modules['triton'] = None; from dinofast import ops; "
        "print(ops.paths()['dino_loss']['cuda'])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert out.startswith("reference (plain torch): Triton is not installed")


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")
def test_a_chunk_without_weight(interpreter: None) -> None:
    """-inf in a whole chunk of a teacher row is a probability of 0; in a whole row it leaves
    nothing to normalize."""
    student, teacher, center = loss_inputs("peaked", 3, 2, 8192 + 3)
    for columns in (slice(8192, None), slice(0, 8192)):
        masked = teacher.clone()
        masked[..., columns] = -math.inf
        ours, expected = (
            ops.dino_loss(student, masked, center, 0.1, 0.04, impl)[:2]
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    teacher[1, 0] = -math.inf
    loss, entropy, _ = ops.dino_loss(student, teacher, center, 0.1, 0.04, "triton")
    assert loss.isnan() and entropy.isnan()


def test_more_numbers_than_are_added_at_a_time(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops that the sizes of the other tests go through once: chunks of a row, crops and images,
    rows of the teacher."""
    from dinofast.kernels import dino_loss as kernels

    for name, value in (("CHUNKS", 2), ("PARTS", 4), ("ROWS", 2)):
        monkeypatch.setattr(kernels, name, value)
    for crops, images, prototypes in ((3, 3, 4 * kernels.CHUNK + 3), (40, 1, 7)):
        student, teacher, center = loss_inputs("peaked", crops, images, prototypes)
        results = []
        for impl in ("triton", "reference"):
            leaf = student.clone().requires_grad_()
            out = ops.dino_loss(leaf, teacher, center, 0.1, 0.04, impl)
            results.append((*out, torch.autograd.grad(out[0], leaf)[0]))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)


# ---- on a GPU
def run(
    inputs: tuple[Tensor, ...],
    impl: str | None,
    upstream: float = 1.0,
    teacher_temp: float | Tensor = 0.04,
) -> tuple[Tensor, ...]:
    """loss, entropy, teacher_sum, gradient of the student."""
    student, teacher, center = (x.cuda() for x in inputs)
    student.requires_grad_()
    loss, entropy, teacher_sum = ops.dino_loss(student, teacher, center, 0.1, teacher_temp, impl)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), entropy, teacher_sum, student.grad


@pytest.mark.parametrize(
    "shape", [(2, 3, 1), (3, 33, 37), (10, 5, 4097), (4, 1, 65537), (10, 16, 65536)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_gpu_no_worse_than_eager(
    gpu: None, kind: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    inputs = loss_inputs(kind, *shape, dtype=dtype)
    exact = run(tuple(x.double() for x in inputs), "reference")
    crops, images, _ = shape
    terms = (1, 1, inputs[1].abs().max().item(), 10 / (images * (crops - 1)))
    for size, ours, eager, truth in zip(
        terms, run(inputs, None), run(inputs, "reference"), exact, strict=True
    ):
        assert_no_worse(ours, eager, truth, terms=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("crops", "teachers", "diagonal"), [(8, 2, True), (2, 2, False), (1, 1, True), (3, 1, False)]
)
def test_gpu_soft_cross_entropy_no_worse_than_eager(
    gpu: None, crops: int, teachers: int, diagonal: bool, dtype: torch.dtype
) -> None:
    student, teacher, _ = loss_inputs("peaked", 8, 5, 40_000, dtype=dtype)
    student = student[:crops].cuda()
    targets = torch.softmax(teacher[:teachers].cuda().float() / 0.04, -1)

    def result(student: Tensor, targets: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        leaf = student.requires_grad_()
        loss = ops.soft_cross_entropy(leaf, targets, diagonal=diagonal, impl=impl)
        return loss.detach(), torch.autograd.grad(loss * 3, leaf)[0]

    exact = result(student.double(), targets.double(), "reference")
    ours, eager = (result(student, targets, impl) for impl in ("triton", "reference"))
    for one, other, truth in zip(ours, eager, exact, strict=True):
        assert_no_worse(one, other, truth, terms=10)


def test_gpu_default_same_bits_and_no_sync(gpu: None) -> None:
    assert ops.paths()["dino_loss"]["cuda"] == "triton"
    inputs = loss_inputs("peaked", 10, 8, 65536, dtype=torch.bfloat16)
    first = run(inputs, "triton", 2.5)
    temp = torch.tensor(0.04, device="cuda")
    student, teacher, center = (x.cuda() for x in inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.dino_loss(student.requires_grad_(), teacher, center, 0.1, temp)[0].backward()
        ops.dino_loss(student, teacher, center, 0.1, 0.04)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in (run(inputs, None, 2.5), run(inputs, None, 2.5, temp)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("which", range(3), ids=("student", "teacher", "center"))
def test_gpu_bad_numbers_are_not_hidden(gpu: None, which: int) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        inputs = loss_inputs("peaked", 3, 2, 9000)
        inputs[which].view(-1)[-1] = bad
        harmless = (which, bad) in ((1, -math.inf), (2, math.inf))  # a probability of exactly 0
        assert run(inputs, "triton")[0].isfinite().item() == harmless


def test_gpu_rows_past_32_bits(gpu: None) -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GiB of GPU memory are free")
    rows = torch.randn(2, 4, 65536, generator=torch.Generator().manual_seed(0)).half().cuda()
    # 2^31 elements between crops
    apart = torch.zeros(2, 4, 2**29, dtype=torch.half, device="cuda")[..., :65536].copy_(rows)
    center = torch.zeros(65536, device="cuda")
    near, far = (ops.dino_loss(x, rows, center, 0.1, 0.04, "triton") for x in (rows, apart))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
