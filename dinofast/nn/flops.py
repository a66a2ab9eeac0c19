"""How many floating-point operations a step of DINO needs, and what a machine could do: the two
sides of MFU."""

from __future__ import annotations

import time

import torch

from ..config import Config
from .onednn_linear import LIBRARIES, linear
from .vit import VisionTransformer

# Dense bf16 and fp16 products with fp32 sums, FLOP/s, from NVIDIA's data sheets, by the first that
# is part of a device's name
_DATA_SHEETS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def forward_flops(
    vit: VisionTransformer, head_widths: list[int], n_crops: int, size: int
) -> tuple[int, int]:
    """Of n crops of size x size pixels, in one forward pass: of the layer over pixels, and of all
    that follows.

    Matrix products only, a multiplication and an addition each counted as one, for all tokens in
    all blocks: what the official network computes. head_widths: of the head's layers from the
    features to the prototypes.
    """
    d, patch = vit.embed_dim, vit.patch_embed.proj.weight.shape[1:].numel()
    n = (size // vit.patch_embed.patch_size) ** 2 + 1  # tokens of a crop
    linear = sum(
        layer.weight.numel() for layer in vit.blocks.modules() if isinstance(layer, torch.nn.Linear)
    )
    attention = 4 * n * n * d * len(vit.blocks)  # q k^T and its product with v
    head = 2 * sum(a * b for a, b in zip(head_widths, head_widths[1:], strict=False))
    return n_crops * 2 * (n - 1) * patch * d, n_crops * (2 * n * linear + attention + head)


def image_flops(
    vit: VisionTransformer, head_widths: list[int], crops: list[tuple[int, int]]
) -> int:
    """Of one image in one step: student forward (1) and backward (2; the pixels take no gradient),
    teacher forward.

    crops: (number, size in pixels), the global ones first. Optimizer, loss and data are no matrix
    products and not counted, nor is what an implementation computes beyond this; what it saves of
    it is counted all the same.
    """
    total = sum(forward_flops(vit, head_widths, *crops[0]))
    for number, size in crops:
        pixels, rest = forward_flops(vit, head_widths, number, size)
        total += 2 * pixels + 3 * rest
    return total


def head_widths(cfg: Config, vit: VisionTransformer) -> list[int]:
    hidden = [cfg.head_hidden_dim] * (cfg.head_layers - 1)
    return [vit.embed_dim, *hidden, cfg.head_bottleneck_dim, cfg.out_dim]


def flops_of(cfg: Config, vit: VisionTransformer) -> int:
    """Of one image of a run with these options."""
    crops = [(2, cfg.global_crops_size), (cfg.local_crops_number, cfg.local_crops_size)]
    return image_flops(vit, head_widths(cfg, vit), crops if cfg.local_crops_number else crops[:1])


def peak_flops(device: torch.device, dtype: torch.dtype, quick: bool = False) -> tuple[float, str]:
    """FLOP/s of matrix products in `dtype`, and whose word that is: a data sheet's, or a
    measurement's. quick: measured on smaller and fewer products, in a tenth of a second."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in _DATA_SHEETS.items():
            if part in name and "MIG" not in name:  # a share of the device
                return peak, f"the data sheet's {peak / 1e12:,.0f} TFLOP/s"
    peak = _measured(device, dtype, *((768, 2) if quick else (2048, 6)))
    tera = f"{peak / 1e12:,.0f}" if peak >= 100e12 else f"{peak / 1e12:.3g}"
    return peak, f"{tera} TFLOP/s, measured on large {str(dtype).removeprefix('torch.')} products"


def _measured(device: torch.device, dtype: torch.dtype, n: int, times: int) -> float:
    """The best of several products of n (on a GPU four times that) squared, by every library that
    the step may take."""
    n, best = 4 * n if device.type == "cuda" else n, 0.0
    # no random numbers: a run draws its weights from the generator that is there
    a, b = (torch.linspace(-1, 1, n * n, device=device).view(n, n).to(dtype) for _ in range(2))
    on_cpu = (
        device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )
    for library in LIBRARIES if on_cpu else LIBRARIES[:1]:
        for _ in range(times):
            _wait(device)
            start = time.perf_counter()
            linear(a, b, None, library)
            _wait(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
