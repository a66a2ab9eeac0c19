"""adamw_ema_, ema_ and grad_norms: what does not fit together is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_adamw_ema import OPTIONS, draw

from dinofast import ops

NEEDS = "cpp"
# NumPy's, from the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.zeros(5)]}, "grads has 1 tensors and params has 2"),
        (
            {"teachers": [None, torch.zeros(4)]},
            r"teachers\[1\] has shape \(4,\): expected \(3,\), that of params\[1\]",
        ),
        (
            {"steps": []},
            r"steps has shapes \[\] and coefficients \(2,\): "
            r"expected 2 tensors \(\) and one \(2,\)",
        ),
        ({"steps": [torch.zeros(0), torch.zeros(())]}, r"steps has shapes \[\(0,\), \(\)\]"),
        (
            {"coefficients": torch.ones(3)},
            r"coefficients \(3,\): expected 2 tensors \(\) and one \(2,\)",
        ),
        ({"param_copies": [torch.zeros(5)]}, "param_copies has 1 tensors and params has 2"),
        (
            {"teachers": [None, None], "teacher_copies": [None, torch.zeros(3)]},
            r"teacher_copies\[1\] is a tensor but teachers\[1\] is None",
        ),
        ({"impl": "fast"}, "impl is 'fast': use one of"),
        (
            {"impl": "cpp", "steps": [torch.zeros((), device="meta")] * 2},
            "impl='cpp' takes tensors on one device",
        ),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.adamw_ema_(**draw([(5,), (3,)]) | OPTIONS | change)


def test_more_refusals() -> None:
    with pytest.raises(ValueError, match="grads is empty"):
        ops.grad_norms([])
    with pytest.raises(ValueError, match="students has 0 tensors and teachers has 1"):
        ops.ema_([torch.zeros(2)], [], 0.9)
