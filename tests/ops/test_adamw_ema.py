"""adamw_ema_, ema_ and grad_norms: C++, Triton (interpreted on the CPU) and the reference, against
float64, torch's AdamW and by hand. What Triton compiles to: test_adamw_ema_triton.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import assert_no_worse
from torch import Tensor

from dinofast import ops

NEEDS = "cpp"
KERNELS = ("cpp", "triton")
IMPLS = ("reference", *KERNELS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of gradients, and of the students of ema_
# shorter than a vector, odd, four chunks, empty
SHAPES = [(1,), (7,), (3, 11), (4097,), (0,), (), (2, 50_001), (5, 3, 2, 2)]
# the same for Triton's chunks, fewer: interpreted
CHUNKS = [(1,), (0,), (2, 1025), (), (2048,), (5, 3, 2, 2)]
OPTIONS: dict[str, Any] = dict(
    lr=0.003, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, momentum=0.99
)
# NumPy's, from the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")


def draw(
    shapes: list[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    teachers: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of adamw_ema_: tensors in the middle of a training, every one at another step;
    every third has no teacher."""
    generator = torch.Generator().manual_seed(seed)

    def tensors(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) * scale for shape in shapes]

    n = len(shapes)
    return {
        "params": tensors(0.02),
        "grads": [g.to(dtype) for g in tensors(1e-3)],
        "exp_avgs": tensors(1e-3),
        "exp_avg_sqs": [v.square() for v in tensors(1e-3)],
        "steps": [torch.tensor(float(7 * i)) for i in range(n)],
        "teachers": [t if teachers and i % 3 < 2 else None for i, t in enumerate(tensors(0.02))],
        "coefficients": torch.rand(n, generator=generator),
        "skip": torch.tensor(False),
    }


def clone(x: Any) -> Any:
    return (
        {k: clone(v) for k, v in x.items()}
        if isinstance(x, dict)
        else [clone(v) for v in x]
        if isinstance(x, list)
        else (x.clone() if isinstance(x, Tensor) else x)
    )


def run(arguments: dict[str, Any], impl: str | None, **options: Any) -> dict[str, Any]:
    """What the arguments are afterwards; those given stay as they are."""
    arguments = clone(arguments)
    ops.adamw_ema_(**arguments, **OPTIONS | options, impl=impl)
    return arguments


def flat(arguments: dict[str, Any]) -> list[Tensor]:
    return [
        x
        for value in arguments.values()
        for x in (value if isinstance(value, list) else [value])
        if x is not None
    ]


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(7), y.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.0, 0.5)},
        {"betas": (0.4, 0.99)},
        {"eps": 0.1},
        {"momentum": 0.0},
        {"momentum": 0.3},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_same_as_the_reference(options: dict[str, Any], impl: str, dtype: torch.dtype) -> None:
    before = draw(SHAPES if impl == "cpp" else CHUNKS, dtype=dtype)
    ours, theirs = run(before, impl, **options), run(before, "reference", **options)
    for name in before:
        for a, b, old in zip(
            flat({"": ours[name]}), flat({"": theirs[name]}), flat({"": before[name]}), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-8)
            frozen = name in ("grads", "coefficients", "skip")
            assert not a.numel() or torch.equal(a, old) == (
                frozen or (name == "params" and options == {"lr": 0.0})
            )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1, 33, 40_003))
def test_no_worse_than_torch(size: int, dtype: torch.dtype, impl: str) -> None:
    """Six steps from zero moments, against torch's AdamW in float64, with its error in float32 as
    the measure."""
    steps, decay, clip = 6, 0.1, 0.37
    if impl == "triton" and size > 4096:
        size = 4099  # interpreted: five chunks are enough
    start = draw([(size,)], dtype=dtype)
    grads = [draw([(size,)], dtype=dtype, seed=1 + i)["grads"][0] for i in range(steps)]
    ours = start | {
        "exp_avgs": [torch.zeros(size)],
        "exp_avg_sqs": [torch.zeros(size)],
        "steps": [torch.zeros(())],
        "coefficients": torch.tensor([clip]),
    }
    for grad in grads:
        ours = run(ours | {"grads": [grad]}, impl)

    def by_torch(wide: torch.dtype) -> tuple[Tensor, ...]:
        p = torch.nn.Parameter(start["params"][0].to(wide))
        teacher = start["teachers"][0].to(wide)
        optimizer = torch.optim.AdamW(
            [p], lr=OPTIONS["lr"], betas=OPTIONS["betas"], eps=OPTIONS["eps"], weight_decay=decay
        )
        for grad in grads:
            p.grad = grad.to(wide) * torch.tensor(clip).to(wide)
            optimizer.step()
            teacher.mul_(OPTIONS["momentum"]).add_((1 - OPTIONS["momentum"]) * p.detach())
        state = optimizer.state[p]
        return p.detach(), state["exp_avg"], state["exp_avg_sq"], teacher

    for name, eager, exact in zip(
        ("params", "exp_avgs", "exp_avg_sqs", "teachers"),
        by_torch(torch.float32),
        by_torch(torch.float64),
        strict=True,
    ):
        assert_no_worse(ours[name][0], eager, exact)
    assert ours["steps"][0] == steps


@pytest.mark.parametrize("impl", IMPLS)
def test_first_step_by_hand(impl: str) -> None:
    """From zero moments the first step is lr against the gradient's sign, whatever its size."""
    done = run(
        {
            "params": [torch.tensor([2.0, 2.0])],
            "grads": [torch.tensor([4.0, -1e3])],
            "exp_avgs": [torch.zeros(2)],
            "exp_avg_sqs": [torch.zeros(2)],
            "steps": [torch.zeros(())],
            "teachers": [torch.zeros(2)],
            "coefficients": torch.tensor([0.5]),
            "skip": torch.tensor(False),
        },
        impl,
        lr=0.25,
        weight_decay=0.5,
        momentum=0.75,
    )
    # 2 (1 - 0.25 0.5) -+ 0.25
    torch.testing.assert_close(done["params"][0], torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(done["teachers"][0], torch.tensor([0.375, 0.5]))
    torch.testing.assert_close(done["exp_avgs"][0], torch.tensor([0.2, -50]))
    torch.testing.assert_close(done["exp_avg_sqs"][0], torch.tensor([0.004, 250.0]))


@pytest.mark.parametrize("impl", IMPLS)
def test_skip_touches_nothing(impl: str) -> None:
    before = with_copies(draw(CHUNKS), torch.bfloat16)
    before["skip"].fill_(True)
    before["grads"][0].fill_(math.nan)
    before["grads"][2].fill_(math.inf)
    assert_same_bits(run(before, impl), before)
    teachers, students, copies = before["params"], clone(before["exp_avgs"]), before["param_copies"]
    written = {"teachers": teachers, "copies": copies}
    kept = clone(written)
    ops.ema_(teachers, students, 0.9, torch.tensor(True), impl, copies=copies)
    assert_same_bits(written, kept)


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_numbers_are_not_hidden(impl: str) -> None:
    for bad in (math.nan, math.inf):
        before = draw([(37,)])
        before["grads"][0][36] = bad
        done = run(before, impl)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "teachers"):
            assert not done[name][0][36].isfinite() and done[name][0][:36].isfinite().all()


@pytest.mark.parametrize("impl", KERNELS)
def test_a_gradient_too_large_to_be_squared_stops_its_weight_only(impl: str) -> None:
    before = draw([(37,)])
    before["grads"][0][5], before["coefficients"][0] = 1e25, 1.0
    done = run(run(before, impl), impl)
    assert done["exp_avg_sqs"][0][5] == math.inf and done["params"][0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    before = draw([(300_001,), *SHAPES * 3], dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            done = run(before, "cpp")
            done["norms"] = ops.grad_norms(before["grads"], "cpp")
            ops.ema_(done["exp_avgs"], done["grads"], 0.7, impl="cpp")
            results.append(done)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_what_no_kernel_takes_goes_to_the_reference() -> None:
    plain = draw([(6, 5), (4, 3, 2, 2)])
    strided, wide, half, layouts, counter = (clone(plain) for _ in range(5))
    strided["grads"][0] = plain["grads"][0].t().contiguous().t()
    layouts["params"][1] = plain["params"][1].to(memory_format=torch.channels_last)
    counter["steps"][0] = plain["steps"][0].double()
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "teachers"):
        wide[name] = [x.double() for x in plain[name]]
        half[name] = [x.bfloat16() for x in plain[name]]
    for odd in (strided, wide, half, layouts, counter):
        assert_same_bits(run(odd, None), run(odd, "reference"))
        with pytest.raises(ValueError, match="impl='cpp' takes"):
            run(odd, "cpp")


@pytest.mark.parametrize("impl", KERNELS)
def test_channels_last_is_taken(impl: str) -> None:
    plain = draw([(4, 3, 2, 2), (9,)])
    same = clone(plain)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "teachers"):
        same[name][0] = plain[name][0].to(memory_format=torch.channels_last)
    done = run(same, impl)
    assert done["params"][0].stride() != plain["params"][0].stride()
    assert_same_bits(done, run(plain, impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_unaligned_views_are_taken(impl: str) -> None:
    """As gradients in a bucket of DDP are, with neighbors that nobody touches."""
    plain = draw([(2049,), (4, 3)])
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "teachers")
    buckets = {
        name: [torch.nn.functional.pad(x.flatten(), (1, 1), value=7) for x in plain[name]]
        for name in names
    }
    views = {
        name: [x[1:-1].view(y.shape) for x, y in zip(buckets[name], plain[name], strict=True)]
        for name in names
    }
    ours = clone(plain) | views
    assert all(x.data_ptr() % 16 for x in ours["params"])
    assert torch.equal(ops.grad_norms(views["grads"], impl), ops.grad_norms(plain["grads"], impl))
    ops.adamw_ema_(**ours, **OPTIONS, impl=impl)
    assert_same_bits(ours, run(plain, impl))
    ops.ema_(views["teachers"], views["params"], 0.5, impl=impl)
    assert all(x[0] == x[-1] == 7 for x in flat(buckets))


@pytest.mark.parametrize("impl", KERNELS)
def test_gradients_of_several_dtypes_in_one_call(impl: str) -> None:
    before = draw([(5,), (1030,), (7,), (3,)])
    before["grads"] = [
        g.to(dtype) for g, dtype in zip(before["grads"], (*DTYPES, torch.float32), strict=True)
    ]
    done, expected = run(before, impl), run(before, "reference")
    for a, b in zip(flat(done), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-8)
    torch.testing.assert_close(
        ops.grad_norms(before["grads"], impl),
        torch.stack([g.float().norm() for g in before["grads"]]),
    )


@pytest.mark.parametrize("impl", KERNELS)
def test_addresses_may_change_between_calls(impl: str) -> None:
    """The same tensors twice, then another gradient, and then another parameter, of the same
    sizes."""
    tensors, expected = draw([(1030,), (7,)]), draw([(1030,), (7,)])
    for name in ("", "", "grads", "params"):
        for x in (tensors, expected):
            x |= {name: [t * 2 for t in x[name]]} if name else {}
        ops.adamw_ema_(**tensors, **OPTIONS, impl=impl)
        ops.adamw_ema_(**expected, **OPTIONS, impl="reference")
        for a, b in zip(flat(tensors), flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-8)


def with_copies(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Every second parameter, and every teacher, has a 16-bit copy."""
    copies = {
        "param_copies": [
            torch.zeros_like(p, dtype=dtype) if i % 2 == 0 else None
            for i, p in enumerate(arguments["params"])
        ],
        "teacher_copies": [
            None if t is None else torch.zeros_like(t, dtype=dtype) for t in arguments["teachers"]
        ],
    }
    return arguments | copies


def assert_rounded(copies: list[Tensor | None], originals: list[Tensor], impl: str) -> None:
    for copy, x in zip(copies, originals, strict=True):
        if copy is not None:
            if impl == "triton" and copy.dtype == torch.bfloat16:  # its interpreter cuts bits off
                x = (x.view(torch.int32) & -65536).view(torch.float32)
            assert torch.equal(copy, x.to(copy.dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_copies(dtype: torch.dtype, impl: str) -> None:
    """They are the masters rounded, and the masters do not know of them."""
    before = draw(CHUNKS, dtype=dtype)
    done = run(with_copies(before, dtype), impl)
    assert_rounded(done.pop("param_copies"), done["params"], impl)
    assert_rounded(done.pop("teacher_copies"), done["teachers"], impl)
    assert_same_bits(done, run(before, impl))
    teachers, copies = done["params"], [torch.zeros_like(p, dtype=dtype) for p in done["params"]]
    ops.ema_(teachers, before["grads"], 0.5, impl=impl, copies=copies)
    assert_rounded(copies, teachers, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, impl: str) -> None:
    grads = draw(dtype=dtype)["grads"]
    exact = torch.stack([g.double().norm() for g in grads])
    norms = ops.grad_norms(grads, impl)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(
        norms.double(), exact, rtol={"cpp": 6e-8, "triton": 3e-7, "reference": 1e-5}[impl], atol=0
    )
    for bad in (math.nan, math.inf):
        grads[3][4096] = bad
        assert ops.grad_norms(grads, impl).isfinite().tolist() == [
            i != 3 for i in range(len(grads))
        ]


def test_norms_neither_overflow_nor_vanish() -> None:
    norms = ops.grad_norms([torch.full((10_000,), x) for x in (1e30, 1e-30)], "cpp")
    torch.testing.assert_close(norms, torch.tensor([1e32, 1e-28]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ema(dtype: torch.dtype, impl: str) -> None:
    for momentum in (0.996, torch.tensor(0.3), 0.0, 1.0):
        teachers, students = draw(CHUNKS)["params"], draw(CHUNKS, dtype=dtype, seed=1)["grads"]
        before = clone(teachers)
        ops.ema_(teachers, students, momentum, impl=impl)
        for t, old, s in zip(teachers, before, students, strict=True):
            exact = momentum * old.double() + (1 - momentum) * s.double()
            torch.testing.assert_close(t.double(), exact, rtol=2e-7, atol=1e-8)
            assert t.dtype == torch.float32 and (momentum != 0.0 or torch.equal(t, s.float()))
            assert momentum != 1.0 or torch.equal(t, old)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_teacher_and_student_stay_equal(impl: str) -> None:
    students = draw(CHUNKS)["params"]
    teachers = clone(students)
    for _ in range(10):
        ops.ema_(teachers, students, 0.996, impl=impl)
    for t, s in zip(teachers, students, strict=True):
        torch.testing.assert_close(t, s, rtol=1e-5 if impl == "reference" else 0, atol=0)


def test_no_tensors_at_all() -> None:
    run(draw([]), None)
    ops.ema_([], [], 0.9)


@pytest.mark.parametrize("impl", IMPLS)
def test_leaves_are_written_and_marked(impl: str) -> None:
    """Parameters need no torch.no_grad around the call, and backward through what was saved before
    it is refused."""
    weight = torch.nn.Parameter(torch.ones(3))
    saved = weight.square().sum()
    ops.ema_([weight], [torch.zeros(3)], 0.5, impl=impl)
    assert weight.tolist() == [0.5] * 3 and weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    with torch.inference_mode():
        inside = torch.ones(3)
        ops.ema_([inside], [torch.zeros(3)], 0.5, impl=impl)
    assert inside.tolist() == [0.5] * 3
