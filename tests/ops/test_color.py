"""The color of crops that are cut already: C++ and Triton against Pillow and the official results,
bit for bit."""

from __future__ import annotations

import budgets
import numpy as np
import pytest
import torch
from PIL import Image
from test_pil import GOLDEN, golden_view

from dinofast import ops
from dinofast.config import Config
from dinofast.data import augmentation
from dinofast.data import backend_pil as pil
from dinofast.data.loader import views

IMPLS = ("cpp", "triton")
LEVELS = torch.arange(256.0).repeat(3, 1)  # a table that leaves the levels as they are


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    )


def by_pil(crop: torch.Tensor, view: np.void) -> torch.Tensor:
    """A crop (S, S, 3) as Pillow colors it: (3, S, S)."""
    whole = view.copy()
    whole["box"], whole["size"] = (0, 0, *crop.shape[:2]), len(crop)
    return torch.from_numpy(pil.render(Image.fromarray(crop.numpy()), whole).copy()).permute(
        2, 0, 1
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("i", range(8))
def test_every_stage_equals_the_official_one(impl: str, i: int) -> None:
    view = golden_view(i)
    if impl == "triton" and view["size"] > 96 and i:
        pytest.skip("one large golden crop is enough for the interpreter")
    crop = GOLDEN[f"{i}.crop"]
    crop = torch.from_numpy(crop.copy())[None]
    for stage, field in (
        ("final_u8", None),
        ("blur_out", "solarize"),
        ("gray_out", "blur_radius"),
        ("jitter", "gray"),
    ):
        if field:
            view[field] = 0  # switched off from the last stage backwards
        if stage == "final_u8" or impl != "triton" or view["size"] <= 96:
            out = ops.color([crop], view.reshape(1, 1), LEVELS, impl=impl)[0].permute(1, 2, 0)
            assert (out.numpy() == GOLDEN[f"{i}.{stage}"]).all(), stage


@pytest.mark.parametrize("impl", IMPLS)
def test_a_plan_of_several_crops_and_images(impl: str) -> None:
    """V and B above 1: which numbers belong to which crop; sides that do not fill a block, one
    larger than a block."""
    rng = np.random.default_rng(3)
    for side, images in ((1, 1), (7, 3), (33, 4)):
        # (4, B)
        drawn = augmentation.draw(5, 0, np.arange(images), views(Config())).views[:, :4].T.copy()
        drawn["blur_radius"][rng.random(drawn.shape) < 0.3] = 3.7
        crops = [noise(images, side, side, seed=v) for v in range(4)]
        out = ops.color(crops, drawn, LEVELS, impl=impl)
        assert out.shape == (4 * images, 3, side, side) and out.dtype == torch.float32
        for v in range(4):
            for b in range(images):
                assert torch.equal(out[v * images + b], by_pil(crops[v][b], drawn[v, b]).float()), (
                    side,
                    v,
                    b,
                )


@pytest.mark.parametrize("impl", IMPLS)
def test_without_any_blur_or_jitter(impl: str) -> None:
    crops, drawn = [noise(2, 5, 5)], np.zeros((1, 2), augmentation.VIEW)
    assert torch.equal(
        ops.color(crops, drawn, LEVELS, impl=impl), crops[0].permute(0, 3, 1, 2).float()
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_by_table(impl: str, dtype: torch.dtype) -> None:
    """The interpreter cuts bf16 off, so its table is one of bf16 numbers."""
    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    crops, drawn = [noise(1, 6, 6)], np.zeros((1, 1), augmentation.VIEW)
    expected = torch.stack([table[c][crops[0][0, ..., c].long()] for c in range(3)]).to(dtype)
    out = ops.color(crops, drawn, table, dtype, impl=impl)
    assert out.dtype == dtype and torch.equal(out[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_kind_of_color(impl: str) -> None:
    """A lattice of all colors, with every step of the hue that a plan can draw and some more; for
    C++ each of the 16.8 million colors is in tests/data/test_native.py."""
    levels = np.array([0, 1, 2, 31, 64, 100, 127, 128, 129, 180, 203, 254, 255], np.uint8)
    lattice = np.stack(np.meshgrid(*[levels] * 3, indexing="ij"), -1).reshape(-1, 3)
    side = int(len(lattice) ** 0.5) + 1
    crop = torch.from_numpy(np.resize(lattice, (side, side, 3)).copy())
    for factors in (
        (1, 1, 1, -0.1),
        (0.61, 1.33, 0.87, 0.07),
        (1.39, 0.72, 1.19, 0.0),
        (1.0, 0.0, 2.5, 0.5),
    ):
        view = np.zeros((1, 1), augmentation.VIEW)
        view["jitter"], view["order"], view["factors"] = True, (3, 1, 0, 2), factors
        assert torch.equal(
            ops.color([crop[None]], view, LEVELS, impl=impl)[0], by_pil(crop, view[0, 0]).float()
        ), factors


@pytest.mark.parametrize("impl", IMPLS)
def test_boxes_of_a_blur(impl: str) -> None:
    image = noise(23, 23)
    for sigma in (0.01, 0.1, 0.499, 0.5, 1.0, 1.2247, 2.0, 3.3, 5.9, 20.0):
        view = np.zeros((), augmentation.VIEW)
        view["blur_radius"] = sigma
        out = ops.color([image[None]], view.reshape(1, 1), LEVELS, impl=impl)[0]
        assert torch.equal(out, by_pil(image, view).float()), sigma


@pytest.mark.parametrize(
    ("crops", "shape", "message"),
    [
        ([torch.zeros(1, 4, 5, 3, dtype=torch.uint8)], (1, 1), r"\(B, S, S, 3\).*\(1, 4, 5, 3\)"),
        ([torch.zeros(1, 4, 4, 3)], (1, 1), "uint8.*float32"),
        ([torch.zeros(1, 3, 4, 4, dtype=torch.uint8).permute(0, 2, 3, 1)], (1, 1), "contiguous"),
        (
            [torch.zeros(2, 4, 4, 3, dtype=torch.uint8)],
            (1, 1),
            r"views are \(1, 1\): give one for each of 1 x 2",
        ),
    ],
)
def test_what_does_not_fit_together(crops: list, shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.color(crops, np.zeros(shape, augmentation.VIEW), LEVELS)
    with pytest.raises(ValueError, match="crops are none"):
        ops.color([], np.zeros((0, 0), augmentation.VIEW), LEVELS)
    with pytest.raises(ValueError, match="norm_lut is"):
        ops.color(
            [torch.zeros(1, 4, 4, 3, dtype=torch.uint8)],
            np.zeros((1, 1), augmentation.VIEW),
            LEVELS[:2],
        )


def test_there_is_no_plain_torch_version(monkeypatch: pytest.MonkeyPatch) -> None:
    crops, drawn = [noise(1, 4, 4)], np.zeros((1, 1), augmentation.VIEW)
    with pytest.raises(ValueError, match="color has no plain torch version"):
        ops.color(crops, drawn, LEVELS, impl="reference")
    monkeypatch.setattr(ops._choice, "NO_CPP", "the C++ core was left out")
    assert ops.paths()["color"]["cpu"] == "none: the C++ core was left out"
    with pytest.raises(
        RuntimeError, match="dinofast.color has no kernel here, .*: the C[+][+] core was left out"
    ):
        ops.color(crops, drawn, LEVELS)  # nobody asked for an implementation
    with pytest.raises(
        RuntimeError, match="impl='cpp' was asked for, but the C[+][+] core was left out"
    ):
        ops.color(crops, drawn, LEVELS, impl="cpp")


def test_compiled_kernels_are_sound(compiled_ahead_of_time) -> None:
    """No stack, no spills; and nothing contracted to an fma, nor a product or quotient rounded
    otherwise than Pillow's."""
    entries = compiled_ahead_of_time("color")
    assert {entry["kernel"] for entry in entries} == {"_means", "_color", "_blur"}
    for entry in entries:
        assert entry["stack"] == entry["spills"] == entry["fused"] == entry["approximate"] == 0, (
            entry
        )
    assert not budgets.over(entries)


@pytest.mark.parametrize("side", [96, 224])
def test_on_a_gpu_as_by_pil(gpu, side: int) -> None:
    drawn = augmentation.draw(5, 0, np.arange(16), views(Config())).views[:, :4].T.copy()
    crops, table = [noise(16, side, side, seed=v) for v in range(4)], torch.randn(3, 256)
    levels = torch.stack(
        [by_pil(crops[v][b], drawn[v, b]) for v in range(4) for b in range(16)]
    ).long()
    expected = torch.stack(
        [row[channel] for row, channel in zip(table, levels.unbind(1), strict=True)], 1
    )
    assert torch.equal(ops.color([c.cuda() for c in crops], drawn, table.cuda()).cpu(), expected)
