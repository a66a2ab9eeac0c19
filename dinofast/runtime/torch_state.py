"""What a caller may have set in torch for code of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def usual_state() -> Iterator[None]:
    """While this lasts: gradients, float32 and the CPU as defaults, whatever the caller has set."""
    dtype, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu") if elsewhere else nullcontext(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
