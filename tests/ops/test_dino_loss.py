"""dino_loss: the kernels (Triton's interpreted) and the reference, against float64, the official
code, and results by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import assert_no_worse
from torch import Tensor

from dinofast import ops, reference
from dinofast.bench.inputs import LOSS_KINDS, loss_inputs

NEEDS = "cpp"
KERNELS = ("cpp", "triton")
IMPLS = ("reference", *KERNELS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NumPy's, from the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")
SHAPES = [  # (V, B, K)
    (2, 3, 1),  # nothing to choose from
    (2, 64, 3),  # shorter than any vector; no local crops
    (3, 33, 37),  # one local crop; not a multiple of a vector
    (10, 5, 4097),  # the official number of crops; one past a block of sums
    (4, 1, 65537),  # one past the official K; fewer images than threads
]


def run(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    impl: str | None,
    upstream: float = 1.0,
    student_temp: float = 0.1,
    teacher_temp: float | Tensor = 0.04,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, entropy, teacher_sum, gradient of the student."""
    student = student.detach().requires_grad_()
    loss, entropy, teacher_sum = ops.dino_loss(
        student, teacher, center, student_temp, teacher_temp, impl
    )
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    assert student.grad.dtype == student.dtype
    return loss.detach(), entropy, teacher_sum, student.grad


def arguments(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    impl: str,
    with_grad: bool = True,
    student_temp: float = 0.1,
) -> tuple:
    """Of the operation itself, below the public function."""
    pairs = reference.pairs(len(student), len(teacher), diagonal=False)
    return student, teacher, center, student_temp, torch.tensor(0.04), pairs, False, with_grad, impl


GOLDEN_CALLS = [
    (name, i)
    for name, n in (("loss_multicrop", 3), ("loss_two_crops", 3), ("loss_wide", 2))
    for i in range(n)
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "call"), GOLDEN_CALLS)
def test_official_results(name: str, call: int, impl: str) -> None:
    data = np.load(Path(__file__).parents[1] / "official" / f"{name}.npz")
    student, teacher, center, grad, center_after = (
        torch.from_numpy(data[f"{key}{call}"])
        for key in ("student", "teacher", "center_before", "grad", "center_after")
    )
    warmup = int(data["warmup_teacher_temp_epochs"])
    epoch, last = int(data[f"epoch{call}"]), float(data["teacher_temp"])
    temp = (
        np.linspace(float(data["warmup_teacher_temp"]), last, warmup)[epoch]
        if epoch < warmup
        else last
    )
    crops = int(data["ncrops"])
    loss, _, teacher_sum, ours = run(
        student.unflatten(0, (crops, -1)),
        teacher.unflatten(0, (2, -1)),
        center[0],
        impl,
        teacher_temp=float(temp),
    )
    torch.testing.assert_close(loss, torch.tensor(data[f"loss{call}"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours.flatten(0, 1), grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item()
    )
    torch.testing.assert_close(
        reference.center_update(center[0], teacher_sum / len(teacher), 0.9), center_after[0]
    )


# fewer, as interpreting takes time
CASES = [("cpp", *case) for case in itertools.product(LOSS_KINDS, DTYPES, SHAPES)] + [
    ("triton", *case)
    for case in (
        *itertools.product(("peaked",), DTYPES, SHAPES),
        ("flat", torch.float32, SHAPES[3]),
        *itertools.product(("huge",), (torch.float32,), SHAPES),
    )
    if case[2] != SHAPES[1]
]


@pytest.mark.parametrize(("impl", "kind", "dtype", "shape"), CASES, ids=str)
def test_no_worse_than_eager(
    impl: str, kind: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    inputs = loss_inputs(kind, *shape, dtype=dtype)
    exact = run(*(x.double() for x in inputs), "reference")
    results = zip(run(*inputs, impl), run(*inputs, "reference"), exact, strict=True)
    crops, images, _ = shape
    # only C++ sums columns in float64
    column = 0 if impl == "cpp" else inputs[1].abs().max().item()
    for terms, (ours, eager, truth) in zip(
        (1, 1, column, 10 / (images * (crops - 1))), results, strict=True
    ):
        # by the interpreter: twice the error of rounding
        truncated = impl == "triton" and ours.dtype == torch.bfloat16
        assert_no_worse(ours, eager, truth, factor=4 if truncated else 2, terms=terms)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient(dtype: torch.dtype, impl: str) -> None:
    inputs = loss_inputs("peaked", 4, 3, 37, dtype=dtype)
    exact = run(*(x.double() for x in inputs), "reference")[3]
    rtol = 4 * torch.finfo(dtype).eps  # a gradient kept in 16 bits is rounded twice
    for upstream in (0.0, -1.7, 1e3):
        ours = run(*inputs, impl, upstream)[3].double()
        torch.testing.assert_close(
            ours, upstream * exact, rtol=rtol, atol=1e-6 * max(1, abs(upstream))
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_uniform_logits_give_log_k(impl: str) -> None:
    for k in (1, 2, 1000):
        loss, entropy, teacher_sum, grad = run(
            torch.full((3, 2, k), 7.0), torch.full((2, 2, k), 0.25), torch.zeros(k), impl
        )
        assert loss.item() == pytest.approx(math.log(k), rel=1e-6, abs=1e-6)
        assert entropy.item() == pytest.approx(math.log(k), rel=1e-6, abs=1e-6)
        assert (teacher_sum == 1).all() and grad.abs().max() < 1e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_a_shift_of_rows_changes_nothing(impl: str) -> None:
    student, teacher, center = loss_inputs("peaked", 4, 3, 50)
    # so that the shift is exact
    student, teacher, center = ((x * 1024).round() / 1024 for x in (student, teacher, center))
    plain = run(student, teacher, center, impl)
    shifted = run(student + 8, teacher - 4, center + 2, impl)
    torch.testing.assert_close(shifted[0], plain[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(shifted[1], plain[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(shifted[3], plain[3], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_certain_and_wrong(impl: str) -> None:
    """Teacher and student sure of different prototypes: the loss is the gap over the temperature,
    however large."""
    student, teacher = torch.full((2, 1, 5), -1e4), torch.full((2, 1, 5), -1e4)
    student[..., 0], teacher[..., 3] = 1e4, 1e4
    loss, entropy, _, grad = run(student, teacher, torch.zeros(5), impl)
    assert loss.item() == pytest.approx(2e5, rel=1e-6) and entropy.item() == 0
    # 1 / (B P student_temp) = 5
    torch.testing.assert_close(grad, torch.tensor([5.0, 0, 0, -5, 0]).expand(2, 1, 5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("which", range(3), ids=("student", "teacher", "center"))
def test_bad_numbers_are_not_hidden(which: int, bad: float, dtype: torch.dtype, impl: str) -> None:
    for at in (0, 36):
        inputs = loss_inputs("peaked", 3, 2, 37, dtype=dtype)
        inputs[which][..., at].view(-1)[-1:].fill_(bad) if which < 2 else inputs[2][at].fill_(bad)
        loss, entropy, teacher_sum, grad = run(*inputs, impl)
        if (which, bad) in ((1, -math.inf), (2, math.inf)):  # a probability of exactly 0
            assert loss.isfinite() and entropy.isfinite()
        else:
            assert not loss.isfinite()
        assert which != 1 or not teacher_sum[at].isfinite()
        assert bad == bad or grad.isnan().any()


@pytest.mark.parametrize("impl", KERNELS)
def test_strided_rows(impl: str) -> None:
    student, teacher, center = loss_inputs("peaked", 4, 3, 40)
    expected = run(student, teacher, center, impl)
    padded = torch.zeros(4, 3, 64)
    padded[..., 5:45] = student
    image_major = student.transpose(0, 1).contiguous().transpose(0, 1)
    # the last axis is not contiguous
    columns = student.transpose(1, 2).contiguous().transpose(1, 2)
    for same in (padded[..., 5:45], image_major, columns):
        assert not same.is_contiguous()
        for ours, theirs in zip(run(same, teacher, center, impl), expected, strict=True):
            assert torch.equal(ours, theirs)
    wide_teacher = torch.cat((teacher, teacher), -1)[..., 40:]
    repeated = center[:1].expand(40)
    assert torch.equal(
        run(student, wide_teacher, repeated, impl)[3],
        run(student, teacher, repeated.clone(), impl)[3],
    )
    one_for_all = student[:1].expand(4, 3, 40)
    assert torch.equal(
        run(one_for_all, teacher, center, impl)[0],
        run(one_for_all.contiguous(), teacher, center, impl)[0],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = loss_inputs("peaked", 4, 7, 5003, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(*inputs, "cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types_are_read_and_written_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    teacher = torch.stack((every, torch.zeros_like(every)))[:, None]
    student = torch.zeros(2, 1, len(every), dtype=dtype)
    assert torch.equal(run(student, teacher, torch.zeros(len(every)), "cpp")[2], every.float())
    student, teacher, center = loss_inputs("peaked", 2, 2, 5000, dtype=dtype)
    kept, wide = (
        run(x * 8, teacher, center, "cpp", student_temp=0.25)[3].double()
        for x in (student, student.float())
    )
    half_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        kept, wide, rtol=1.001 * half_unit, atol=1.001 * half_unit * torch.finfo(dtype).tiny
    )
    assert 0 < kept[kept != 0].abs().min() < 1e-6


def test_float16_gradients_survive_a_loss_scale() -> None:
    inputs = loss_inputs("flat", 10, 8, 4099, dtype=torch.float16)
    exact = run(*(x.double() for x in inputs), "reference", upstream=65536.0)
    ours, eager = (run(*inputs, impl, upstream=65536.0) for impl in ("cpp", "reference"))
    assert_no_worse(ours[3], eager[3], exact[3])


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes(impl: str) -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    expected = run(student.bfloat16().float(), teacher, center.half().float(), impl)
    for ours, theirs in zip(
        run(student.bfloat16(), teacher, center.half(), impl), expected, strict=True
    ):
        torch.testing.assert_close(
            ours.float(), theirs, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-6, atol=1e-5
        )


def test_float64_goes_to_the_reference() -> None:
    inputs = tuple(x.double() for x in loss_inputs("peaked", 3, 2, 37))
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(*inputs, None), run(*inputs, "reference"), strict=True)
    )
    assert run(*inputs, None)[0].dtype == torch.float64


def test_reference_gradient() -> None:
    student, teacher, center = (x.double() for x in loss_inputs("peaked", 3, 2, 5))
    assert torch.autograd.gradcheck(
        lambda x: ops.dino_loss(x, teacher, center, 0.1, 0.04, "reference")[0],
        student.requires_grad_(),
    )


@pytest.mark.parametrize("impl", KERNELS)
def test_what_is_kept_for_backward(impl: str) -> None:
    """Without a gradient nothing, with one the gradient itself (C++) or far less than the logits
    (Triton)."""
    student, teacher, center = loss_inputs("peaked", 10, 2, 5000)
    nothing, saved = (
        torch.ops.dinofast.dino_loss(*arguments(student, teacher, center, impl, with_grad))[3]
        for with_grad in (False, True)
    )
    assert nothing.numel() == 0
    assert saved.shape == student.shape if impl == "cpp" else saved.numel() == 5000 + 2 * 2 * 12 + 4


@pytest.mark.parametrize("impl", IMPLS)
def test_any_number_of_teacher_crops(impl: str) -> None:
    for crops, teachers in ((2, 1), (5, 1), (1, 2), (3, 3), (2, 4)):
        student, teacher, center = loss_inputs("peaked", max(crops, teachers, 2), 3, 1030)
        student, teacher = student[:crops], (student * 0.7 + 0.01)[:teachers]
        if impl == "triton" and teachers > 2:
            with pytest.raises(ValueError, match="impl='triton' takes 1 or 2 teacher crops, not"):
                run(student, teacher, center, impl)
            continue
        q = torch.softmax((teacher - center) / 0.04, -1)
        log_p = torch.log_softmax(student / 0.1, -1)
        pairs = [(t, v) for t in range(teachers) for v in range(crops) if t != v]
        loss, *_, grad = run(student, teacher, center, impl)
        expected = -sum((q[t] * log_p[v]).sum(-1).mean() for t, v in pairs) / len(pairs)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        by_hand = sum(
            torch.nn.functional.one_hot(torch.tensor(v), crops)[:, None, None]
            * (log_p[v].exp() - q[t])
            for t, v in pairs
        ) / (len(pairs) * 3 * 0.1)
        torch.testing.assert_close(grad, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_center_may_move_before_backward(impl: str) -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    expected = run(student, teacher, center.clone(), impl)[3]
    leaf = student.clone().requires_grad_()
    loss, *_ = ops.dino_loss(leaf, teacher, center, 0.1, 0.04, impl)
    center.add_(1.0)
    loss.backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_teacher_from_inference_mode(impl: str) -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    expected = run(student, teacher, center, impl)[3]
    with torch.inference_mode():
        teacher = teacher * 1
    assert torch.equal(run(student, teacher, center, impl)[3], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streamed_gradients_are_the_others(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large results get, in a small one: stores past the cache, into memory of an earlier
    result."""
    # whole blocks, a part of one, rows that do not lie on 16 bytes
    for shape in ((3, 2, 1024), (3, 3, 4104), (4, 1, 37)):
        inputs = loss_inputs("peaked", *shape, dtype=dtype)
        expected = run(*inputs, "cpp", upstream=2.0)
        with monkeypatch.context() as patch:
            patch.setattr(ops._dino_loss, "_LARGE", 0)
            for ours, theirs in zip(run(*inputs, "cpp", upstream=2.0), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_many_certain_teachers_do_not_overflow_float16() -> None:
    student = torch.zeros(6, 2, 64, dtype=torch.float16)
    teacher = torch.full((5, 2, 64), -100.0)
    teacher[..., 3] = 100.0
    ours, expected = (
        run(student, teacher, torch.zeros(64), impl)[3] for impl in ("cpp", "reference")
    )
    assert expected.isfinite().all() and expected.abs().max() > 0
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("which", range(3), ids=("student", "teacher", "center"))
def test_tensors_that_are_not_plain_memory(which: int) -> None:
    inputs = list(loss_inputs("peaked", 3, 2, 37))
    for special in (torch._neg_view, lambda x: torch._efficientzerotensor(x.shape)):
        changed = [special(x) if i == which else x for i, x in enumerate(inputs)]
        plain = [x.resolve_neg() + 0 for x in changed]
        for ours, expected in zip(
            ops.dino_loss(*changed, 0.1, 0.04), ops.dino_loss(*plain, 0.1, 0.04), strict=True
        ):
            assert torch.equal(ours, expected)
    from torch.testing._internal.two_tensor import TwoTensor  # a subclass without memory of its own

    inputs[which] = TwoTensor(inputs[which], inputs[which])
    with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError)):
        loss = ops.dino_loss(*inputs, 0.1, 0.04)[0]
        assert isinstance(loss, TwoTensor), "a subclass was read as if it were plain memory"
        raise RuntimeError("taken apart by the dispatcher, as it should be")


def test_large_gradients_take_turns_in_one_memory() -> None:
    """Memory goes on to the next gradient only when nobody holds the one before."""
    student, teacher, center = loss_inputs("flat", 10, 1, 2**20)
    leaf = student.requires_grad_()

    def gradient(upstream: float) -> Tensor:
        return torch.autograd.grad(
            ops.dino_loss(leaf, teacher, center, 0.1, 0.04, "cpp")[0] * upstream, leaf
        )[0]

    first, second = gradient(1.0), gradient(1.0)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    kept = first.clone()
    address = second.data_ptr()
    del second
    third = gradient(1.0)
    assert third.data_ptr() == address and torch.equal(third, kept) and torch.equal(first, kept)
    assert first.is_contiguous() and first.dtype == torch.float32
