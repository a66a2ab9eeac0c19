"""soft_cross_entropy: the kernels (Triton's interpreted) and the reference, against float64 and by
hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from accuracy import assert_no_worse
from torch import Tensor

from dinofast import ops, soft_cross_entropy
from dinofast.bench.inputs import loss_inputs

IMPLS = ("reference", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NumPy's, from the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")


def draw(
    crops: int,
    teachers: int,
    images: int,
    prototypes: int,
    dtype: torch.dtype = torch.float32,
    peaked: str = "peaked",
) -> tuple[Tensor, Tensor]:
    """Logits (V, B, K) in dtype and probabilities (T, B, K) in float32."""
    student = loss_inputs(peaked, max(crops, 2), images, prototypes, dtype=dtype)[0][:crops]
    teacher = loss_inputs(peaked, max(teachers, 2), images, prototypes, seed=1)[0][:teachers]
    return student, torch.softmax(teacher / 0.04, -1)


def run(
    student: Tensor, targets: Tensor, impl: str | None, upstream: float = 1.0, **options: object
) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = soft_cross_entropy(student, targets, impl=impl, **options)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return loss.detach(), student.grad


@pytest.mark.parametrize("impl", ("cpp", "triton"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("diagonal", (True, False))
# two chunks, one column over, one
@pytest.mark.parametrize("sizes", ((8, 2, 3, 1027), (1, 1, 5, 2049), (2, 2, 2, 1)), ids=str)
def test_no_worse_than_eager(
    sizes: tuple[int, ...], diagonal: bool, dtype: torch.dtype, impl: str
) -> None:
    if sizes[:2] == (1, 1) and not diagonal:
        diagonal = True  # there is no other pair
    student, targets = draw(*sizes, dtype=dtype)
    exact = run(student.double(), targets.double(), "reference", diagonal=diagonal)
    results = zip(
        run(student, targets, impl, diagonal=diagonal),
        run(student, targets, "reference", diagonal=diagonal),
        exact,
        strict=True,
    )
    # of a row about 10; the loss is the sum over all pairs
    terms_of = (10 * sizes[0] * sizes[1], 10 / sizes[2])
    for terms, (ours, eager, truth) in zip(terms_of, results, strict=True):
        # by the interpreter; few entries count
        truncated = impl == "triton" and ours.dtype == torch.bfloat16
        assert_no_worse(ours, eager, truth, factor=8 if truncated else 2, terms=terms)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_need_not_sum_to_one(impl: str) -> None:
    """Every probability counts as it is: half the probabilities, half the loss and gradient."""
    student, targets = draw(3, 2, 2, 50)
    whole, half = run(student, targets, impl), run(student, targets / 2, impl)
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(b, a / 2, rtol=1e-6, atol=1e-7)
    uneven = targets * torch.tensor([1.0, 0.0])[:, None, None]
    torch.testing.assert_close(
        run(student, uneven, impl)[0], run(student, targets[:1], impl)[0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions_and_pairs_by_hand(impl: str) -> None:
    student, targets = draw(3, 2, 4, 33)
    log_p = torch.log_softmax(student / 0.1, -1)
    each = -torch.einsum("tbk,vbk->tv", targets, log_p) / 4
    for diagonal in (True, False):
        used = (
            each if diagonal else each - torch.diagonal_scatter(torch.zeros(2, 3), each.diagonal())
        )
        total = run(student, targets, impl, diagonal=diagonal)[0]
        torch.testing.assert_close(total, used.sum(), rtol=1e-5, atol=0)
        mean, grad = run(student, targets, impl, upstream=-3.0, diagonal=diagonal, reduction="mean")
        torch.testing.assert_close(mean, used.sum() / (6 if diagonal else 4), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            grad,
            run(student, targets, impl, diagonal=diagonal)[1] * -3 / (6 if diagonal else 4),
            rtol=1e-4,
            atol=1e-7,
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_uniform_logits_give_log_k(impl: str) -> None:
    loss, grad = run(torch.full((2, 3, 1000), 5.0), torch.full((1, 3, 1000), 1e-3), impl)
    assert loss.item() == pytest.approx(2 * math.log(1000), rel=1e-5) and grad.abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_numbers_are_not_hidden(impl: str) -> None:
    for which, bad in itertools.product(range(2), (math.nan, math.inf)):
        inputs = draw(3, 2, 2, 37)
        inputs[which][1, 1, 36] = bad
        assert not run(*inputs, impl)[0].isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_lists_of_crops(impl: str) -> None:
    student, targets = draw(4, 2, 3, 40)
    expected = run(student, targets, impl)
    leaf = student.flatten(0, 1).requires_grad_()
    loss = soft_cross_entropy((leaf * 1).chunk(4), list(targets), impl=impl)
    loss.backward()
    torch.testing.assert_close((loss.detach(), leaf.grad.view(4, 3, 40)), expected)


def test_what_lies_side_by_side_is_viewed_and_all_else_copied() -> None:
    whole = torch.randn(12, 40, requires_grad=True) * 1
    pieces, stacked = whole.chunk(4), ops._dino_loss._stacked
    views = (
        pieces,
        pieces[1:],
        pieces[::2],
        [*pieces[:3], pieces[3].detach()],
        list(whole.detach().unflatten(0, (4, 3))),
        list(whole.unflatten(0, (4, 3))),
        [whole],
        torch.zeros(12, 80).chunk(2, 1),
        whole.split([3, 9])[1].chunk(3),
    )
    copies = (
        pieces[::-1],
        [pieces[0], pieces[1], pieces[3]],
        [x * 1 for x in pieces],
        [torch._neg_view(x) for x in pieces],
        [whole[:3], whole[3:6].t().contiguous().t()],
    )
    for given, viewed in [(x, True) for x in views] + [(x, False) for x in copies]:
        assert torch.equal(stacked(given), torch.stack(tuple(given)))
        assert (stacked(given).data_ptr() == given[0].data_ptr()) == viewed


def test_what_is_done_to_the_chunks_counts() -> None:
    """Hooks on chunks, gradients asked for of chunks, views by functions of one's own, chunks made
    without gradient."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            return -g

    student, targets = draw(4, 2, 3, 40)
    expected = run(student, targets, "cpp")[1].flatten(0, 1)

    def gradient(change) -> tuple[Tensor, list[Tensor]]:
        leaf = student.flatten(0, 1).requires_grad_()
        pieces = change(leaf * 1)
        soft_cross_entropy(pieces, targets, impl="cpp").backward()
        return leaf.grad, pieces

    def hooked(x: Tensor) -> list[Tensor]:
        pieces = list(x.chunk(4))
        pieces[1].register_hook(lambda g: g * 0)
        return pieces

    def retained(x: Tensor) -> list[Tensor]:
        pieces = list(x.chunk(4))
        pieces[2].retain_grad()
        return pieces

    zeroed = expected.clone()
    zeroed[3:6] = 0
    torch.testing.assert_close(gradient(hooked)[0], zeroed)
    torch.testing.assert_close(gradient(retained)[1][2].grad, expected[6:9])
    torch.testing.assert_close(
        gradient(lambda x: [Reversed.apply(piece) for piece in x.chunk(4)])[0], -expected
    )
    torch.testing.assert_close(gradient(lambda x: Reversed.apply(x).chunk(4))[0], -expected)
    torch.testing.assert_close(gradient(lambda x: x.split(3))[0], expected)
    leaf = student.flatten(0, 1).requires_grad_()
    with torch.no_grad():
        pieces = [piece.requires_grad_() for piece in leaf.chunk(4)]
    soft_cross_entropy(pieces, targets, impl="cpp").backward()
    assert leaf.grad is None
    torch.testing.assert_close(torch.cat([piece.grad for piece in pieces]), expected)


@pytest.mark.parametrize("impl", (None, "triton"))
def test_compiles_as_one_graph(impl: str | None) -> None:
    student, targets = draw(4, 2, 3, 40)
    expected = run(student, targets, impl, 2.0)
    leaf = student.flatten(0, 1).requires_grad_()
    compiled = torch.compile(
        lambda x, q: soft_cross_entropy((x * 1).chunk(4), q, impl=impl) * 2.0, fullgraph=True
    )
    loss = compiled(leaf, targets)
    loss.backward()
    torch.testing.assert_close((loss.detach() / 2, leaf.grad.view(4, 3, 40)), expected)


@pytest.mark.parametrize("impl", ("cpp", "triton"))
def test_opcheck(impl: str) -> None:
    student, targets = draw(3, 2, 2, 37)
    given = (student.requires_grad_(), targets, None, 0.1, torch.ones(()), 1, True, True, impl)
    torch.library.opcheck(torch.ops.dinofast.dino_loss.default, given)
    if impl == "triton":
        torch.library.opcheck(
            torch.ops.dinofast.dino_loss_backward.default,
            (
                torch.tensor(2.0),
                student.detach(),
                targets,
                torch.ops.dinofast.dino_loss(*given)[3],
                0.1,
                False,
                1,
                True,
            ),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": []}, "a list of crops is empty"),
        (
            {"student": [torch.zeros(2, 5), torch.zeros(3, 5)]},
            r"crops have shapes \[\(2, 5\), \(3, 5\)\]",
        ),
        ({"targets": torch.zeros(2, 3, 5)}, r"targets has shape \(2, 3, 5\): expected \(T, 2, 5\)"),
        (
            {"targets": torch.zeros(1, 2, 5), "student": torch.zeros(1, 2, 5), "diagonal": False},
            "targets has 1: without the pairs",
        ),
        ({"reduction": "none"}, "reduction is 'none': use 'sum' or 'mean'"),
        ({"student_temp": -1.0}, "student_temp is -1.0"),
        ({"targets": torch.zeros(2, 2, 5, dtype=torch.long)}, "targets is torch.int64"),
        ({"impl": "fast"}, "impl is 'fast': use one of"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    good = {"student": torch.zeros(3, 2, 5), "targets": torch.zeros(2, 2, 5)}
    soft_cross_entropy(**good)
    with pytest.raises(ValueError, match=message):
        soft_cross_entropy(**good | change)
