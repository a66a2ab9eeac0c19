"""normalize: schema, Triton implementation, fake, and the public function with its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._choice import choose, library

library.define("normalize(Tensor crops, Tensor norm_lut, str impl) -> Tensor")


def _normalize_kernel(crops: Tensor, norm_lut: Tensor, impl: str) -> Tensor:
    from ..kernels.normalize import normalize as kernel

    return kernel(
        crops if crops.is_contiguous(memory_format=torch.channels_last) else crops.contiguous(),
        norm_lut.contiguous(),
    )


for _device in ("CPU", "CUDA"):
    library.impl("normalize", _normalize_kernel, _device)
torch.library.register_fake(
    "dinofast::normalize",
    lambda crops, norm_lut, impl: norm_lut.new_empty(crops.shape),
    lib=library,
)


def normalize(crops: Tensor, norm_lut: Tensor, impl: str | None = None) -> Tensor:
    """Each level of each crop by a table, such as normalization and the cast to bfloat16, in one
    pass; see `reference.normalize`.

    crops (N, 3, H, W), uint8, contiguous or channels_last, else copied first; norm_lut (3, 256) on
    their device, float32, bfloat16, float16 or float64: what each level of each channel becomes.
    impl: None takes the fastest; "reference" or "triton" (CUDA; on the CPU only under
    TRITON_INTERPRET=1) that one or an error. Returns (N, 3, H, W) in norm_lut's dtype, contiguous,
    without gradient. Raises ValueError for tensors that do not fit.
    """
    if crops.dtype != torch.uint8 or crops.ndim != 4 or crops.shape[1] != 3:
        raise ValueError(f"crops are {tuple(crops.shape)} {crops.dtype}: give (N, 3, H, W) uint8.")
    if (
        norm_lut.shape != (3, 256)
        or not norm_lut.is_floating_point()
        or norm_lut.device != crops.device
    ):
        raise ValueError(
            f"norm_lut is {tuple(norm_lut.shape)} {norm_lut.dtype} on {norm_lut.device}: "
            f"give (3, 256) floating-point numbers on {crops.device}."
        )
    norm_lut = norm_lut.detach()
    impl = choose("normalize", impl, norm_lut)
    if impl == "reference":
        return reference.normalize(crops, norm_lut)
    return torch.ops.dinofast.normalize(crops, norm_lut, impl)
