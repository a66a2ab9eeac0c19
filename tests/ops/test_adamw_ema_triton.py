"""adamw_ema_, ema_ and grad_norms in Triton: the machine code without a GPU, what the host sends,
and the kernels on a GPU. Interpreted: test_adamw_ema.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import budgets
import pytest
import torch
from accuracy import assert_no_worse
from test_adamw_ema import DTYPES, OPTIONS, SHAPES, assert_same_bits, clone, draw, with_copies
from torch import Tensor, nn

from dinofast import AdamWEMA, ops, param_groups


@pytest.mark.parametrize("architecture", (80, 90))
def test_compiled_for_every_configuration(
    compiled_ahead_of_time: Callable, architecture: int
) -> None:
    kernels = [k for k in compiled_ahead_of_time("adamw_ema") if k["architecture"] == architecture]
    assert {k["kernel"] for k in kernels} == {
        "_square_sums",
        "_norms",
        "_prepare",
        "_adamw_ema",
        "_ema",
    }
    assert len(kernels) == 3 * 4 * 2 + 2
    for k in kernels:
        assert k["stack"] == 0 and k["spills"] == 0, k
        is_fp32 = k["grad"] == "torch.float32"
        loads, stores = {
            "_square_sums": (4 if is_fp32 else 2, 0),
            "_ema": (4 if is_fp32 else 2, 2),
            "_adamw_ema": (10 if is_fp32 else 8, 8),
        }.get(k["kernel"], (0, 0))
        # 8 bytes at a time of 16-bit numbers beside fp32
        expected = (loads, stores) if k["aligned"] else (0, 0)
        assert (k["loads_16"], k["stores_16"]) == expected, k
    assert not budgets.over(kernels)


@pytest.fixture
def kernels(interpreter: None) -> Any:
    from dinofast.kernels import adamw_ema, multi_tensor

    multi_tensor._tables_on_stream.cache_clear()
    return adamw_ema


def test_on_the_cpu_only_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op, arguments in (
        ("grad_norms", ([torch.ones(2)],)),
        ("ema_", ([torch.ones(2)], [torch.ones(2)], 0.5)),
    ):
        with pytest.raises(ValueError, match=f"impl='triton' has no {op} for cpu tensors"):
            getattr(ops, op)(*arguments, impl="triton")


def test_what_is_sent(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks once for the same sizes and dtypes, addresses once for the same tensors."""
    from dinofast.kernels import multi_tensor

    sent: list[tuple[int, ...]] = []
    upload = multi_tensor._upload
    monkeypatch.setattr(
        multi_tensor,
        "_upload",
        lambda x, device: (sent.append(tuple(x.shape)), upload(x, device))[1],
    )
    x = draw([(1030,), (7,)])
    tables, addresses = [(3, 2), (2, 2)], [(16,)]  # of 3 chunks, 2 tensors and 8 rows
    for change, expected in (("", tables + addresses), ("", []), ("grads", addresses), ("", [])):
        sent.clear()
        x |= {change: [t.clone() for t in x[change]]} if change else {}
        ops.adamw_ema_(**x, **OPTIONS, impl="triton")
        assert sent == expected


def test_many_chunks_and_no_numbers(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor with more chunks than are added at a time; nothing but empty tensors, whose counters
    move all the same."""
    monkeypatch.setattr(kernels, "PARTS", 2)
    x = torch.randn(5 * kernels.NORM_BLOCK + 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ops.grad_norms([x[:1], x], "triton")[1].double(), x.double().norm(), rtol=3e-7, atol=0
    )
    empty = draw([(0,), (0, 3)])
    ops.adamw_ema_(**empty, **OPTIONS, impl="triton")
    assert [step.item() for step in empty["steps"]] == [1, 8]
    assert ops.grad_norms(empty["grads"], "triton").tolist() == [0, 0]


# ---- on a GPU
def moved(x: Any, to: str | torch.dtype) -> Any:
    """To a device, or what is neither a counter nor a truth value to a dtype."""
    if isinstance(x, dict):
        return {
            k: v if k == "steps" and isinstance(to, torch.dtype) else moved(v, to)
            for k, v in x.items()
        }
    if isinstance(x, list):
        return [moved(v, to) for v in x]
    return (
        x.to(to, copy=True)
        if isinstance(x, Tensor) and not (isinstance(to, torch.dtype) and x.dtype == torch.bool)
        else x
    )


def done(x: dict[str, Any], impl: str | None, **options: Any) -> dict[str, Any]:
    x = clone(x)
    ops.adamw_ema_(**x, **OPTIONS | options, impl=impl)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.0, 0.5)}, {"momentum": 0.3}, {"momentum": 0.0}], ids=str
)
def test_gpu_no_worse_than_eager(gpu: None, options: dict[str, Any], dtype: torch.dtype) -> None:
    x = moved(draw([*SHAPES, (3_000_001,)], dtype=dtype), "cuda")
    ours = done(x, None, **options)
    eager = done(x, "reference", **options)
    exact = done(moved(x, torch.float64), "reference", **options)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "teachers"):
        for a, b, c in zip(ours[name], eager[name], exact[name], strict=True):
            if a is not None and a.numel():
                assert_no_worse(a, b, c)
    assert_same_bits({"": ours["steps"]}, {"": eager["steps"]})
    norms = [ops.grad_norms(x["grads"], impl) for impl in (None, "reference")]
    assert_no_worse(*norms, torch.stack([g.double().norm() for g in x["grads"]]))
    teachers = [clone(x["params"]) for _ in range(3)]
    teachers[2] = moved(teachers[2], torch.float64)
    for ts, impl in zip(teachers, (None, "reference", "reference"), strict=True):
        ops.ema_(ts, x["grads"], 0.996, impl=impl)
    for a, b, c in zip(*teachers, strict=True):
        if a.numel():
            assert_no_worse(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gpu_copies_same_bits_and_unaligned_views(gpu: None, dtype: torch.dtype) -> None:
    x = moved(with_copies(draw(dtype=dtype), dtype), "cuda")
    x["grads"][0] = x["grads"][0].float()  # several dtypes in one call
    first = done(x, "triton")
    assert_same_bits(first, done(x, None))
    for copies, originals in (("param_copies", "params"), ("teacher_copies", "teachers")):
        for a, b in zip(first[copies], first[originals], strict=True):
            assert a is None or torch.equal(a, b.to(dtype))
    views = clone(x)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        views[name] = [
            torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in views[name]
        ]
    ops.adamw_ema_(**views, **OPTIONS, impl="triton")
    assert_same_bits(views, first)
    assert torch.equal(ops.grad_norms(views["grads"]), ops.grad_norms(clone(views["grads"])))


def test_gpu_skip_and_bad_numbers(gpu: None) -> None:
    x = moved(with_copies(draw(), torch.bfloat16), "cuda")
    x["grads"][3][4096] = float("nan")
    x["skip"].fill_(True)
    assert_same_bits(done(x, "triton"), x)
    x["skip"].fill_(False)
    after = done(x, "triton")
    assert [p.isfinite().all().item() for p in after["params"]] == [
        i != 3 for i in range(len(SHAPES))
    ]
    assert ops.grad_norms(x["grads"], "triton").isfinite().tolist() == [
        i != 3 for i in range(len(SHAPES))
    ]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("clip_mode", ("tensor", "global"))
def test_gpu_a_training_step_waits_for_nothing(
    gpu: None, clip_mode: str, dtype: torch.dtype
) -> None:
    """The same as on the CPU, with gradients at new addresses in every step."""
    assert all(ops.paths()[op]["cuda"] == "triton" for op in ("grad_norms", "adamw_ema_", "ema_"))
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(70, 300), nn.LayerNorm(300), nn.Linear(300, 5)).to(dtype)]
    models.append(copy.deepcopy(models[0]).cuda())
    grads = [[torch.randn(p.shape).to(dtype) for p in models[0].parameters()] for _ in range(4)]
    teachers = [copy.deepcopy(model) for model in models]
    for model, teacher in zip(models, teachers, strict=True):
        model[2].requires_grad_(False)
        optimizer = AdamWEMA(
            param_groups(model),
            lr=0.01,
            student=model,
            teacher=teacher,
            clip_grad=0.1,
            clip_mode=clip_mode,
        )
        for step, values in enumerate(grads):
            for p, g in zip(model.parameters(), values, strict=True):
                p.grad = g.to(p.device) if p.requires_grad else None
            if step and model is models[1]:
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step(momentum=0.9)
            finally:
                torch.cuda.set_sync_debug_mode("default") if model is models[1] else None
        assert optimizer.skipped.item() == 0
    for pair in (models, teachers):
        for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            torch.testing.assert_close(
                a, b.cpu(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6
            )


def test_gpu_not_in_a_graph(gpu: None) -> None:
    x = moved(draw([(5,)]), "cuda")
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.adamw_ema_(**x, **OPTIONS)


def test_gpu_tensors_past_32_bits(gpu: None) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    n = 2**31 + 2049
    teacher, student = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    for at in (0, 2**31 - 1, 2**31, n - 1):
        student[at] = 4.0
    ops.ema_([teacher], [student], 0.75)
    assert teacher.count_nonzero() == 4 and teacher[-1] == 1 and teacher[2**31] == 1
    assert ops.grad_norms([student]).item() == 8.0
