"""normalize: the reference and Triton against the arithmetic of torchvision's ToTensor and
Normalize, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import budgets
import pytest
import torch
from torch import Tensor

from dinofast import ops
from dinofast.config import Config
from dinofast.data import make_loader

IMPLS = ("reference", "triton")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [  # (N, H, W)
    (1, 1, 1),  # one level a channel
    (3, 5, 7),  # an odd size, less than a block
    (2, 33, 32),  # a block and a part of one
    (2, 96, 96),  # whole blocks
]


def arithmetic(crops: Tensor, dtype: torch.dtype) -> Tensor:
    """As torchvision's ToTensor and Normalize, with the official means and deviations."""
    mean, std = (
        torch.tensor(x, device=crops.device).view(3, 1, 1)
        for x in (Config().image_mean, Config().image_std)
    )
    return crops.float().div(255).sub(mean).div(std).to(dtype).contiguous()


def table(dtype: torch.dtype) -> Tensor:
    return arithmetic(torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256), dtype).view(3, 256)


def noise(count: int, height: int, width: int) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, height, width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


def interleaved(crops: Tensor) -> Tensor:
    """The same crops, stored as Pillow has them."""
    return crops.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_arithmetic_in_every_layout(
    shape: tuple[int, int, int], dtype: torch.dtype, impl: str
) -> None:
    crops = noise(*shape)
    wider = torch.cat((crops, crops), -1)[..., : shape[2]]  # neither planes nor pixels side by side
    for same in (crops, interleaved(crops), wider):
        out = ops.normalize(same, table(dtype), impl)
        assert out.dtype == dtype and out.is_contiguous()
        assert torch.equal(out, arithmetic(crops, dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_every_level_of_every_channel(impl: str) -> None:
    numbers = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    out = ops.normalize(levels, numbers, impl)
    assert torch.equal(out, numbers.view(1, 3, 16, 16).expand(2, 3, 16, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gets_the_crops_of_a_cpu(
    interpreter: None, photographs: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The kernel with the loader's table, on the levels that the loader has normalized by
    arithmetic."""
    loader = make_loader(
        Config(
            data_path=str(photographs),
            output_dir=str(tmp_path),
            data_backend="pil",
            num_workers=0,
            global_crops_size=32,
            local_crops_size=16,
            local_crops_number=2,
            batch_size_per_gpu=2,
        )
    )
    loader.dtype, normalize, levels = dtype, loader._normalize, []
    loader._normalize = lambda crops: (levels.append(crops), normalize(crops))[1]
    crops = next(loader)
    assert len(crops) == 2 and not levels[1].is_contiguous()
    for expected, taken in zip(crops, levels[1:], strict=True):  # after the 256 levels of the table
        assert torch.equal(ops.normalize(taken, loader._norm_lut, "triton"), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_crops(impl: str) -> None:
    assert ops.normalize(noise(0, 4, 4), table(torch.float32), impl).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(interpreter: None, dtype: torch.dtype) -> None:
    for crops in (noise(2, 5, 7), interleaved(noise(2, 5, 7))):
        torch.library.opcheck(torch.ops.dinofast.normalize.default, (crops, table(dtype), "triton"))


def test_compiles_as_one_graph(interpreter: None) -> None:
    crops, numbers = noise(2, 5, 7), table(torch.float32)
    compiled = torch.compile(lambda x: ops.normalize(x, numbers, "triton") + 1, fullgraph=True)
    assert torch.equal(compiled(crops), arithmetic(crops, torch.float32) + 1)


@pytest.mark.parametrize(
    ("crops", "numbers", "message"),
    [
        (
            torch.zeros(1, 3, 4, 4),
            torch.zeros(3, 256),
            "crops are (1, 3, 4, 4) torch.float32: give (N, 3, H, W) uint8",
        ),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, 256), "crops are (1, 4, 4, 3)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 256), "crops are (3, 4, 4)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(256), "norm_lut is (256,)"),
        (
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(3, 256, dtype=torch.long),
            "norm_lut is (3, 256) torch.int64",
        ),
        (
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(3, 256, device="meta"),
            "on meta: give (3, 256)",
        ),
    ],
)
def test_what_does_not_fit_together(crops: Tensor, numbers: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.normalize(crops, numbers)


def test_no_kernel_on_a_cpu() -> None:
    assert ops.paths()["normalize"]["cpu"] == "reference (plain torch): no kernel for this device"
    with pytest.raises(ValueError, match="impl='cpp' has no normalize for cpu tensors"):
        ops.normalize(noise(1, 4, 4), table(torch.float32), "cpp")


def test_compiled_kernels_are_sound(compiled_ahead_of_time: Callable) -> None:
    kernels = compiled_ahead_of_time("normalize")
    assert len(kernels) == 2 * 2 * 2 * 2
    for k in kernels:
        assert k["stack"] == 0 and k["spills"] == 0, k
        assert k["stores_16"] == (3 if k["whole"] else 0), k
    assert not budgets.over(kernels)


# ---- on a GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 224, 224), (3, 223, 225)], ids=str)
def test_gpu_bits_of_the_arithmetic(
    gpu: None, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert ops.paths()["normalize"]["cuda"] == "triton"
    crops, numbers = noise(*shape).cuda(), table(dtype).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [ops.normalize(same, numbers) for same in (crops, interleaved(crops))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for out in results:
        assert torch.equal(out.cpu(), arithmetic(crops.cpu(), dtype))
