"""The C++ crops against PIL and the official results, bit for bit."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from test_pil import GOLDEN, golden_view

from dinofast.config import Config
from dinofast.data import backend_native as native
from dinofast.data import backend_pil as pil
from dinofast.data.augmentation import VIEW, draw
from dinofast.data.loader import views

pytestmark = pytest.mark.skipif(
    bool(native.unavailable_reason()), reason=native.unavailable_reason() or "here"
)
old_pillow = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason=f"Pillow before 13 resizes some boxes in another order, and this is {PIL.__version__}",
)


def render(image: np.ndarray, drawn: np.ndarray, **options: object) -> list[np.ndarray]:
    """Crops (S, S, 3) of an image (H, W, 3) by views (V,)."""
    out = [torch.full((3, side, side), 77, dtype=torch.uint8) for side in drawn["size"].tolist()]
    native.render(image, drawn, out, **options)
    return [crop.permute(1, 2, 0).numpy() for crop in out]


def one(image: np.ndarray, **fields: object) -> np.ndarray:
    """A view of a whole square image at its size, in which nothing is done but what is named."""
    view = np.zeros(1, VIEW)
    view["box"] = (0, 0, *image.shape[:2])
    view["size"] = len(image)
    view["order"] = range(4)
    view["factors"] = (1, 1, 1, 0)
    for name, value in fields.items():
        view[name] = value
    return view


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_stage_equals_the_official_one() -> None:
    drawn = np.stack([golden_view(i) for i in range(8)])
    stages = {
        "final_u8": (),
        "blur_out": ("solarize",),
        "gray_out": ("solarize", "blur_radius"),
        "jitter": ("solarize", "blur_radius", "gray"),
        "crop": ("solarize", "blur_radius", "gray", "jitter", "flip"),
    }
    for stage, switched_off in stages.items():
        changed = drawn.copy()
        for name in switched_off:
            changed[name] = 0
        for i, crop in enumerate(render(GOLDEN["image"], changed)):
            assert (crop == GOLDEN[f"{i}.{stage}"]).all(), (i, stage)


@pytest.fixture(scope="module")
def all_colors() -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 3, indexing="ij"), -1).reshape(
        4096, 4096, 3
    )


@pytest.mark.parametrize(
    ("operation", "factors"),
    [
        (0, (0.6137, 1.3999)),
        (1, (0.6, 1.31)),
        (2, (0.8, 1.1873)),
        (3, (0.0999, -0.1, 0.0)),
    ],
)
def test_every_color_becomes_what_pil_makes_of_it(
    all_colors: np.ndarray, operation: int, factors: tuple
) -> None:
    """All 16.8 million. The hue's turn by 0 is the way to HSV and back, in which every HSV that a
    color has occurs."""
    for factor in factors:
        all_factors = [1.0, 1.0, 1.0, 0.0]
        all_factors[operation] = factor
        (crop,) = render(all_colors, one(all_colors, jitter=True, factors=all_factors))
        assert (
            crop == np.asarray(pil.jitter(Image.fromarray(all_colors), [0, 1, 2, 3], all_factors))
        ).all(), factor


def test_gray_and_solarize(all_colors: np.ndarray) -> None:
    (crop,) = render(all_colors, one(all_colors, gray=True, solarize=True))
    assert (
        crop
        == pil.render(Image.fromarray(all_colors), one(all_colors, gray=True, solarize=True)[0])
    ).all()


@pytest.mark.parametrize("side", (1, 2, 5, 64, 224))
def test_blur(side: int) -> None:
    image = noise(side, side)
    for radius in (0.1, 0.31, 0.5, 0.77, 1.0, 1.63, 2.0, 3.7, 11.0):
        view = one(image, blur_radius=radius)
        assert (render(image, view)[0] == pil.render(Image.fromarray(image), view[0])).all(), radius


@old_pillow
def test_any_box_of_any_image() -> None:
    """Enlarged and reduced, long and narrow, at every border, one pixel."""
    rng = np.random.default_rng(1)
    for case in range(120):
        height, width = rng.integers(1, 500, 2).tolist()
        h, w = (int(rng.integers(1, n + 1)) for n in (height, width))
        image = noise(height, width, case)
        box = (int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
        view = one(image, box=box, size=int(rng.choice([1, 7, 32, 96, 224])), flip=bool(case % 2))
        assert (render(image, view)[0] == pil.render(Image.fromarray(image), view[0])).all(), (
            height,
            width,
            view,
        )


@old_pillow
def test_a_whole_plan() -> None:
    kinds = views(Config(global_crops_size=64, local_crops_size=32))
    for sample, size in enumerate(((375, 500), (500, 333), (64, 64), (31, 200), (3, 2))):
        drawn = draw(3, 1, np.array([sample]), kinds).plan(0, *size)
        image = noise(*size, sample)
        for crop, view in zip(render(image, drawn), drawn, strict=True):
            assert (crop == pil.render(Image.fromarray(image), view)).all(), (size, view)


def test_levels_by_table() -> None:
    image, table = noise(40, 30), torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    drawn = np.concatenate([one(image, box=(3, 2, 20, 21), size=16), one(image, size=9, flip=True)])
    exact = [
        table.numpy()[np.arange(3)[:, None, None], crop.transpose(2, 0, 1)]
        for crop in render(image, drawn)
    ]
    for dtype in (torch.float32, torch.bfloat16):
        out = [torch.full((3, side, side), 7, dtype=dtype) for side in (16, 9)]
        native.render(image, drawn, out, table.numpy())
        for crop, expected in zip(out, exact, strict=True):
            assert torch.equal(crop, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box": (0, 0, 41, 30)}, "a box does not lie in the image"),
        ({"box": (-1, 0, 3, 3)}, "a box does not lie in the image"),
        ({"box": (0, 2**31 - 2, 3, 3)}, "a box does not lie in the image"),
        ({"box": (0, 0, 0, 3)}, "a box does not lie in the image"),
        ({"size": 0}, "a box does not lie in the image"),
        ({"jitter": True, "order": (0, 1, 2, 4)}, "an order names a color operation beyond 3"),
        ({"jitter": True, "factors": (1, float("nan"), 1, 0)}, "a color factor"),
        ({"jitter": True, "factors": (1, 1, 1, -1e300)}, "a color factor"),
        ({"blur_radius": float("nan")}, "a blur radius"),
        ({"blur_radius": 1e9}, "a blur radius"),
    ],
)
def test_what_would_leave_the_image_is_refused(fields: dict, message: str) -> None:
    image = noise(40, 30)
    view = one(image, **{"size": 8, "box": (0, 0, 8, 8)} | fields)
    with pytest.raises(ValueError, match=message):
        render(image, view)
    for bad in (image[..., 0], image[..., :2], image.astype(np.int64)):
        with pytest.raises((ValueError, TypeError)):
            native.render(
                bad, one(image, size=8, box=(0, 0, 8, 8)), [torch.empty(3, 8, 8, dtype=torch.uint8)]
            )


@pytest.mark.parametrize(
    "out",
    [
        [torch.empty(3, 8, 9, dtype=torch.uint8)],
        [torch.empty(3, 7, 7, dtype=torch.uint8)],
        [torch.empty(192, dtype=torch.uint8)],
        [torch.empty(8, 8, 3, dtype=torch.uint8).permute(2, 0, 1)],
        [torch.empty(3, 8, 8, dtype=torch.uint8)] * 2,
        [],
    ],
)
def test_a_place_that_a_crop_would_overrun_is_refused(out: list[torch.Tensor]) -> None:
    image = noise(40, 30)
    with pytest.raises(ValueError, match="does not fit its place|zip"):
        native.render(image, one(image, size=8, box=(0, 0, 8, 8)), out)


def test_images_need_not_be_contiguous() -> None:
    image = noise(40, 60)
    view = one(image, box=(0, 0, 20, 20), size=8)
    for same in (np.asfortranarray(image), np.ascontiguousarray(image[:, ::-1])[:, ::-1]):
        assert (render(same, view)[0] == render(image, view)[0]).all()


def test_pixels_are_lent_where_pillow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    array = noise(40, 60)
    image = Image.fromarray(array)
    lent = native.pixels(image)
    assert (lent[..., :3] == array).all() and lent.shape[2] == (
        4 if hasattr(image, "__arrow_c_array__") else 3
    )
    view = one(array, box=(3, 2, 20, 21), size=16)
    expected = render(array, view)[0]
    assert (render(lent, view)[0] == expected).all() and not lent.flags.writeable
    del image  # the memory stays with whoever reads it
    assert (render(lent, view)[0] == expected).all()

    several = Image.fromarray(np.tile(array, (50, 40, 1)))  # 19 MB: more than one block
    assert native.pixels(several).shape == (2000, 2400, 3)
    monkeypatch.setattr(Image.core, "get_alignment", lambda: 64)
    assert native.pixels(Image.fromarray(array)).shape == (40, 60, 3)


@pytest.mark.skipif(
    not hasattr(Image.Image, "__arrow_c_array__"), reason="Pillow before 11.3 lends nothing"
)
def test_what_is_lent_must_be_the_image() -> None:
    image = Image.fromarray(noise(40, 60))
    schema, array = image.__arrow_c_array__()
    for capsule, height in (
        (schema, 40),
        (array, 41),
        (image.convert("L").__arrow_c_array__()[1], 40),
    ):
        with pytest.raises(ValueError, match="not "):
            native._C.arrow_view(capsule, height, 60)


def test_memory_of_crops_is_used_again_only_when_nobody_holds_it() -> None:
    held = [native._C.empty(1 << 20) for _ in range(6)]
    addresses = {array.ctypes.data for array in held}
    assert len(addresses) == 6
    kept = held.pop()
    del held
    again = [native._C.empty(1 << 20) for _ in range(4)]
    assert {array.ctypes.data for array in again} <= addresses - {kept.ctypes.data}
