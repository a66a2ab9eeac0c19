"""adamw_ema_, ema_ and grad_norms under opcheck and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_adamw_ema import DTYPES, KERNELS, OPTIONS, clone, draw, flat, run, with_copies
from torch import Tensor

from dinofast import ops, reference

NEEDS = "cpp"
# NumPy's, from the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, impl: str) -> None:
    x = with_copies(draw([(5,), (3, 4), ()], dtype=dtype), torch.bfloat16)
    number = torch.tensor(0.1, dtype=torch.float64)
    holes = [
        y
        for name in ("teachers", "param_copies", "teacher_copies")
        for y in ([t for t in x[name] if t is not None], [t is not None for t in x[name]])
    ]
    for skip in (False, True):
        torch.library.opcheck(
            torch.ops.dinofast.adamw_ema_.default,
            (
                x["params"],
                x["grads"],
                x["exp_avgs"],
                x["exp_avg_sqs"],
                x["steps"],
                *holes,
                x["coefficients"],
                torch.tensor(skip),
                number,
                number,
                0.9,
                0.999,
                1e-8,
                number,
                impl,
            ),
        )
        torch.library.opcheck(
            torch.ops.dinofast.ema_.default,
            (x["params"], x["grads"], *holes[2:4], number, torch.tensor(skip), impl),
        )
    torch.library.opcheck(torch.ops.dinofast.grad_norms.default, (x["grads"], impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_compiles_as_one_graph(impl: str) -> None:
    before = draw([(5,), (3, 4), (7,)])
    coefficients = reference.clip_coefficients(ops.grad_norms(before["grads"], impl), 1e-3)
    expected = run(before | {"coefficients": coefficients}, impl)
    ops.ema_(expected["exp_avgs"], expected["params"], 0.5, impl=impl)

    @torch.compile(fullgraph=True)
    def compiled(x: dict[str, Any], lr: Tensor) -> None:
        x["coefficients"] = reference.clip_coefficients(ops.grad_norms(x["grads"], impl), 1e-3)
        ops.adamw_ema_(**x, **OPTIONS | {"lr": lr}, impl=impl)
        ops.ema_(x["exp_avgs"], x["params"], 0.5, impl=impl)

    ours = clone(before)
    compiled(ours, torch.tensor(OPTIONS["lr"], dtype=torch.float64))
    assert not torch.equal(ours["params"][0], before["params"][0])
    for a, b in zip(flat(ours), flat(expected), strict=True):
        torch.testing.assert_close(a, b)
