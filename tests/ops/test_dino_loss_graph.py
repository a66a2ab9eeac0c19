"""dino_loss under torch.compile, opcheck, autograd's modes and traces."""

from __future__ import annotations

import pytest
import torch
from test_dino_loss import DTYPES, IMPLS, KERNELS, arguments, run
from torch import Tensor

from dinofast import ops
from dinofast.bench.inputs import loss_inputs

NEEDS = "cpp"
# NumPy's, from the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_grad", (True, False))
@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl: str, dtype: torch.dtype, with_grad: bool) -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37, dtype=dtype)
    given = arguments(student.requires_grad_(with_grad), teacher, center, impl, with_grad)
    torch.library.opcheck(torch.ops.dinofast.dino_loss.default, given)
    if impl == "triton" and with_grad:
        saved = torch.ops.dinofast.dino_loss(*given)[3]
        torch.library.opcheck(
            torch.ops.dinofast.dino_loss_backward.default,
            (torch.tensor(2.0), student.detach(), teacher, saved, 0.1, True, 4, False),
        )


@pytest.mark.parametrize("impl", (None, "triton"))
def test_compiles_as_one_graph(impl: str | None) -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    expected = run(student, teacher, center, impl, upstream=2.5)

    @torch.compile(fullgraph=True)
    def compiled(student: Tensor, teacher_temp: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.dino_loss(student, teacher, center, 0.1, teacher_temp, impl)

    for temp in (0.04, torch.tensor(0.04)):
        leaf = student.clone().requires_grad_()
        loss, *rest = compiled(leaf, temp)
        (loss * 2.5).backward()
        for ours, theirs in zip((loss.detach(), *rest, leaf.grad), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_modes(impl: str) -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    expected = run(student, teacher, center, impl)
    leaf, teacher = student.clone().requires_grad_(), teacher.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, *_ = ops.dino_loss(leaf, teacher, center, 0.1, 0.04, impl)
        assert not loss.requires_grad and torch.equal(loss, expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, entropy, teacher_sum = ops.dino_loss(
            leaf, teacher, center, 0.1, torch.tensor(0.04), impl
        )
    assert (
        loss.dtype == torch.float32 and not entropy.requires_grad and not teacher_sum.requires_grad
    )
    torch.testing.assert_close(loss, expected[0])
    for times in (1, 2, 3):  # the gradient that is kept must not be touched by what is done with it
        loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, times * expected[3])
    assert teacher.grad is None
    # only the teacher requires it
    assert not ops.dino_loss(student, teacher, center, 0.1, 0.04, impl)[0].requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_several_in_one_graph(impl: str) -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    leaf = student.clone().requires_grad_()
    first, second = (
        ops.dino_loss(leaf * factor, teacher, center, 0.1, 0.04, impl)[0] for factor in (1, 2)
    )
    (first + 3 * second).backward()
    expected = (
        run(student, teacher, center, impl)[3] + 6 * run(2 * student, teacher, center, impl)[3]
    )
    torch.testing.assert_close(leaf.grad, expected)


def test_batch_sizes_do_not_recompile() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *x: ops.dino_loss(*x, 0.1, 0.04)[0],
        dynamic=True,
        fullgraph=True,
        backend="aot_eager",
    )
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for images in (2, 3, 5, 7, 4):
            inputs = loss_inputs("peaked", 3, images, 37)
            torch.testing.assert_close(compiled(*inputs), ops.dino_loss(*inputs, 0.1, 0.04)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_computes_and_does_not_remember() -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    traced = torch.jit.trace(
        lambda x: ops.dino_loss(x, teacher, center, 0.1, 0.04, "cpp")[0], student
    )
    assert torch.equal(
        traced(student * 5), ops.dino_loss(student * 5, teacher, center, 0.1, 0.04)[0]
    )


def test_forward_mode_is_refused() -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        ops.dino_loss(
            torch.autograd.forward_ad.make_dual(student, student), teacher, center, 0.1, 0.04
        )


def test_second_derivative_is_refused() -> None:
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    loss, *_ = ops.dino_loss(student.requires_grad_(), teacher, center, 0.1, 0.04, "cpp")
    with pytest.raises(NotImplementedError, match="second derivative.*impl='reference'"):
        torch.autograd.grad(loss, student, create_graph=True)
