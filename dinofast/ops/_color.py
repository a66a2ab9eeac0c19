"""color: the numbers that its kernels take, C++ and Triton, and the public function with its
checks.

Nothing traces or differentiates the data path, so it is no operator of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ._choice import _C, choose

_CPP_KINDS = {torch.float32: 1, torch.bfloat16: 2}


def color(
    crops: Sequence[Tensor],
    views: np.ndarray,
    norm_lut: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str | None = None,
) -> Tensor:
    """Mirror, color jitter, gray, blur and solarization as drawn, then each level by a table: what
    follows the cut of a crop.

    crops: V tensors (B, S, S, 3), uint8, contiguous, RGB; views (V, B) of `data.augmentation.VIEW`,
    whose boxes and sizes are not looked at; norm_lut (3, 256) float32 on their device: what each
    level of each channel becomes, for example normalized. Returns (V B, 3, S, S) in `dtype`,
    crop-major.
    Bit for bit what Pillow 13 makes of the same crops (arXiv 2104.14294, section 3.2); there is no
    plain torch version beside it. impl: None, "cpp" (CPU) or "triton" (CUDA; on the CPU only under
    TRITON_INTERPRET=1). Raises ValueError for tensors or views that do not fit together,
    RuntimeError without a kernel.
    """
    if not len(crops):
        raise ValueError("crops are none: give one tensor (B, S, S, 3) a view.")
    shape, device = crops[0].shape, norm_lut.device
    for c in crops:
        if (
            c.dtype != torch.uint8
            or c.shape != shape
            or c.ndim != 4
            or shape[1] != shape[2]
            or shape[3] != 3
            or c.device != device
            or not c.is_contiguous()
        ):
            raise ValueError(
                f"crops must be contiguous uint8 tensors (B, S, S, 3) on {device}, and one is "
                f"{tuple(c.shape)} {c.dtype} on {c.device}."
            )
    if views.shape != (len(crops), shape[0]):
        raise ValueError(
            f"views are {views.shape}: give one for each of {len(crops)} x {shape[0]} crops."
        )
    if (
        norm_lut.shape != (3, 256)
        or norm_lut.dtype != torch.float32
        or not norm_lut.is_contiguous()
    ):
        raise ValueError(
            f"norm_lut is {tuple(norm_lut.shape)} {norm_lut.dtype}: give (3, 256) float32, "
            "contiguous."
        )
    impl = choose("color", impl, norm_lut)
    if impl == "cpp":
        return _color_cpp(crops, views, norm_lut, dtype)
    from ..kernels.color import color as kernel

    rows, n_blurred = numbers(views)
    return kernel(crops, _sent(torch.from_numpy(rows), device), n_blurred, norm_lut, dtype)


def numbers(views: np.ndarray) -> tuple[np.ndarray, int]:
    """What the Triton kernels know of each crop, int32 (V B, FIELDS) as kernels/color.py names
    them, and how many are blurred."""
    views = views.ravel()
    order = views["order"].astype(np.int32)  # (V B, 4)
    factors = np.take_along_axis(views["factors"], order.astype(np.int64), 1)
    factors = np.where(order == 3, np.trunc(factors * 255), factors).astype(np.float32)
    blurred = np.flatnonzero(views["blur_radius"] > 0)
    rows = np.full((len(views), 17), -1, np.int32)
    rows[:, 0:4], rows[:, 4:8] = order, factors.view(np.int32)
    rows[:, 8] = np.where(views["jitter"], (order == 1).argmax(1), -1)
    rows[:, 9], rows[:, 10] = views["gray"], views["solarize"]
    rows[blurred, 11:14] = np.stack(_box_blur(views["blur_radius"][blurred]), 1)
    rows[blurred, 14] = np.arange(len(blurred))
    rows[: len(blurred), 15] = blurred
    rows[:, 16] = views["flip"]
    return rows, len(blurred)


def _box_blur(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes of which three passes come near Gaussians (Gwosdek et al., SSVM 2011), as Pillow
    rounds them.

    sigma (n,), pixels. Three int64 (n,): whole pixels on either side, their weight in 24 bits, that
    of the two beyond them.
    """
    sigma2 = np.asarray(sigma).astype(np.float32) ** 2 / np.float32(3)
    length = np.sqrt(12.0 * sigma2.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma2)
    box = whole + rest / (6 * (sigma2 - (whole + 1) * (whole + 1)))
    radius, near = box.astype(np.int64), (np.float32(1 << 24) / (box * 2 + 1)).astype(np.int64)
    return radius, near, ((1 << 24) - (radius * 2 + 1) * near) // 2


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _color_cpp(
    crops: Sequence[Tensor], views: np.ndarray, norm_lut: Tensor, dtype: torch.dtype
) -> Tensor:
    (images, side, _, _), kind = crops[0].shape, dtype if dtype in _CPP_KINDS else torch.float32
    out = torch.empty(len(crops) * images, 3, side, side, dtype=kind)
    whole = views.copy()
    whole["box"], whole["size"] = (0, 0, side, side), side  # nothing is left to cut
    for crop, view, place in zip(
        (c for batch in crops for c in batch), whole.ravel(), out, strict=True
    ):
        _C.multicrop(
            crop.numpy(), view.reshape(1), [place.data_ptr()], _CPP_KINDS[kind], norm_lut.numpy()
        )
    return out.to(dtype)
